rule prepare:
    # Take the configured checkpoint, or build a Switch Transformer, train its tokenizer and pre-train it.
    input:
        unpack(pretraining_input(CHECKPOINT)),
    output:
        model=directory(f"{RESULTS}/base/seed{{seed}}/model"),
        training=f"{RESULTS}/base/seed{{seed}}/training.parquet",
    log:
        messages=f"{LOGS}/prepare/seed{{seed}}.log",
        usage=f"{BENCHMARKS}/prepare/seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["pretrain"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        code=code("prepare"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("prepare"),
        device=DEVICE,
        state=f"{STATE}/base/seed{{seed}}",
        source=model_source(CHECKPOINT),
        options=pretraining_options(CHECKPOINT),
    message:
        "prepare the base model, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "{params.source} --seed {wildcards.seed} --device={params.device:q} "
        "--model {output.model:q} --training {output.training:q} --state {params.state:q} "
        "{params.options} "
        "--log {log.messages:q}"


use rule prepare as prepare_dense with:
    # The same without experts, to compare with.
    input:
        unpack(pretraining_input(DENSE_CHECKPOINT)),
    output:
        model=directory(f"{RESULTS}/base/seed{{seed}}/dense"),
        training=f"{RESULTS}/base/seed{{seed}}/dense_training/training.parquet",
    log:
        messages=f"{LOGS}/prepare/seed{{seed}}-dense.log",
        usage=f"{BENCHMARKS}/prepare/seed{{seed}}-dense.tsv",
    params:
        code=code("prepare"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("prepare"),
        device=DEVICE,
        state=f"{STATE}/base/seed{{seed}}-dense",
        source=model_source(DENSE_CHECKPOINT, dense=True),
        options=pretraining_options(DENSE_CHECKPOINT),
    message:
        "prepare the dense model, seed {wildcards.seed}"
