# What the rules of data and of the base model read, and with which options.


def raw_data(wildcards):
    """The task's own file, and the files its rows are read from; no rows' where they come from the hub."""
    source, task = CONFIG["data"]["source"], TASKS[wildcards.task]
    described = {"described": str(described_in(task))}
    if source == "hub":
        return described
    if source == "synthetic":
        return described | {
            split: f"{RESULTS}/data/{wildcards.task}/{split}.parquet"
            for split in ("train", "validation")
        }
    return described | {
        split: str(path)
        for split, path in task_files(CONFIG["data"]["folder"], task).items()
    }


def data_options(*keys):
    """Settings of the data, with the task's own first, as command-line options."""

    def made(wildcards):
        settings = configuration.stage_settings(CONFIG, "data", wildcards.task)
        return as_flags({key: settings[key] for key in keys})

    return made


def raw_source(wildcards, input):
    """Where prepare_data reads, as command-line options."""
    if CONFIG["data"]["source"] == "hub":
        return "--hub"
    return shlex.join(
        ["--train-file", str(input.train), "--validation-file", str(input.validation)]
    )


def pretraining_input(wildcards):
    """Files of the corpus, and the tasks' examples where their text is trained on."""
    found = {}
    if CONFIG["model"]["checkpoint"] is None:
        if CONFIG["pretrain"]["corpus"] == "files":
            found["corpus"] = CONFIG["pretrain"]["files"]
        if CONFIG["pretrain"]["task_text"]:
            found["examples"] = [
                f"{RESULTS}/{task}/seed{wildcards.seed}/examples/train.parquet"
                for task in TASKS
            ]
    elif Path(CONFIG["model"]["checkpoint"]).is_dir():
        found["checkpoint"] = CONFIG["model"]["checkpoint"]
    return found


def model_source(wildcards, input):
    """The checkpoint to take, or what a model is built and pre-trained from, as command-line options."""
    if CONFIG["model"]["checkpoint"] is not None:
        return shlex.join(["--checkpoint", CONFIG["model"]["checkpoint"]])
    words = ["--corpus-seed", str(CONFIG["data"]["seed"])]
    if "examples" in input.keys():
        words += [
            "--examples",
            *([input.examples] if isinstance(input.examples, str) else input.examples),
        ]
    return shlex.join(words)


def pretraining_options(wildcards):
    """Architecture, tokenizer and pre-training settings as command-line options; none for a given checkpoint."""
    if CONFIG["model"]["checkpoint"] is not None:
        return ""
    model = CONFIG["model"]
    parts = [
        {"architecture": json.dumps(model["architecture"], sort_keys=True)},
        {key: model[key] for key in ("near_heads", "residual_scale")},
        model["tokenizer"],
        CONFIG["pretrain"],
    ]
    return " ".join(
        as_flags({key: value for key, value in part.items() if key != "task_text"})
        for part in parts
    )
