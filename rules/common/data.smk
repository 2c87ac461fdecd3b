# What the rules of data and of the base model read, and with which options.


# Sources whose rows are written here, from the generator or from installed packages.
MADE_HERE = ("synthetic", "sources")


def raw_data(wildcards):
    """The files that the rows of a task are read from; none where they come from the hub."""
    source = CONFIG["data"]["source"]
    if source == "hub":
        return {}
    if source in MADE_HERE:
        return {
            split: PLACES.data(wildcards.task, split)
            for split in ("train", "validation")
        }
    found = task_files(CONFIG["data"]["folder"], TASKS[wildcards.task])
    return {split: str(path) for split, path in found.items()}


def data_options(*keys):
    """Settings of the data, with the task's own first, as command-line options."""

    def made(wildcards):
        settings = configuration.stage_settings(CONFIG, "data", wildcards.task)
        return as_flags({key: settings[key] for key in keys})

    return made


def made_from(wildcards):
    """What texts are taken from, as command-line options: which packages, of which versions, and files."""
    if CONFIG["data"]["source"] != "sources":
        return ""
    told = {key: CONFIG["data"][key] for key in configuration.SOURCES}
    told["versions"] = package_versions(CONFIG["data"]["packages"])
    return as_flags({"sources": json.dumps(told, sort_keys=True)})


def raw_source(wildcards, input):
    """Where prepare_data reads, as command-line options."""
    if CONFIG["data"]["source"] == "hub":
        return "--hub"
    return as_flags({"train_file": input.train, "validation_file": input.validation})


def pretraining_input(given):
    """Files of the corpus, and the tasks' examples where their text is trained on; or the given checkpoint."""

    def made(wildcards):
        found = {}
        if given is None:
            if CONFIG["pretrain"]["corpus"] == "files":
                found["corpus"] = CONFIG["pretrain"]["files"]
            if (
                CONFIG["pretrain"]["task_text"]
                or CONFIG["pretrain"]["corpus"] == "tasks"
            ):
                found["examples"] = [
                    PLACES.run(task, wildcards.seed).examples("train") for task in TASKS
                ]
        elif Path(given).is_dir():
            found["checkpoint"] = given
        return found

    return made


def model_source(given, dense=False):
    """The checkpoint to take, or what a model is built and pre-trained from, as command-line options."""

    def made(wildcards, input):
        words = {"dense": True} if dense else {}
        if given is not None:
            return as_flags({**words, "checkpoint": given})
        words["corpus_seed"] = CONFIG["data"]["seed"]
        if "examples" in input.keys():
            examples = input.examples
            words["examples"] = (
                [examples] if isinstance(examples, str) else list(examples)
            )
        return as_flags(words)

    return made


def pretraining_options(given):
    """Architecture, tokenizer and pre-training settings as command-line options; none for a given checkpoint."""
    if given is not None:
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
