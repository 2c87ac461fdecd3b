rule finetune:
    # Train the full model on the task, every expert and the router.
    input:
        model=f"{RESULTS}/base/seed{{seed}}/model",
        train=f"{RUN}/examples/train.parquet",
        selection=f"{RUN}/examples/selection.parquet",
    output:
        model=directory(f"{RUN}/full"),
        training=f"{RUN}/full_training/training.parquet",
        selection=f"{RUN}/full_training/selection.parquet",
    log:
        messages=f"{LOGS}/finetune/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/finetune/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["finetune"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        code=code("finetune"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("finetune"),
        device=DEVICE,
        state=f"{STATE}/{{task}}/seed{{seed}}/full",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("finetune"),
        dense="",
        limits=limits(),
    message:
        "fine-tune the full model on {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
        "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
        "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
        "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} "
        "{params.dense} "
        "--log {log.messages:q}"


use rule finetune as finetune_dense with:
    # The same of a model without experts, to compare with.
    input:
        model=f"{RESULTS}/base/seed{{seed}}/dense",
        train=f"{RUN}/examples/train.parquet",
        selection=f"{RUN}/examples/selection.parquet",
    output:
        model=directory(f"{RUN}/{{variant}}/1e/finetuned"),
        training=f"{RUN}/{{variant}}/1e/finetuned_training/training.parquet",
        selection=f"{RUN}/{{variant}}/1e/finetuned_training/selection.parquet",
    log:
        messages=f"{LOGS}/finetune/{{task}}-seed{{seed}}-{{variant}}.log",
        usage=f"{BENCHMARKS}/finetune/{{task}}-seed{{seed}}-{{variant}}.tsv",
    params:
        code=code("finetune"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("finetune"),
        device=DEVICE,
        state=f"{STATE}/{{task}}/seed{{seed}}/{{variant}}",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("finetune"),
        dense="--dense",
        limits=limits(),
    message:
        "fine-tune the dense model on {wildcards.task}, seed {wildcards.seed}"
