rule recover:
    # Train the merged model on, routers frozen, with the full model as teacher.
    input:
        model=before_recovery,
        train=f"{RUN}/examples/train.parquet",
        selection=f"{RUN}/examples/selection.parquet",
        teacher=teacher("recover"),
    output:
        model=directory(f"{RUN}/{{variant}}/{{experts}}e/recovered"),
        training=f"{RUN}/{{variant}}/{{experts}}e/recovered_training/training.parquet",
        selection=f"{RUN}/{{variant}}/{{experts}}e/recovered_training/selection.parquet",
    log:
        messages=f"{LOGS}/recover/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.log",
        usage=f"{BENCHMARKS}/recover/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["recover"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        code=code("recover"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("recover"),
        device=DEVICE,
        given=given("teacher"),
        state=f"{STATE}/{{task}}/seed{{seed}}/{{variant}}-{{experts}}e-recovered",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("recover"),
        method=method_options("distillation_weight"),
        limits=limits(),
    message:
        "win the quality of {wildcards.variant} {wildcards.experts}e back on {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
        "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
        "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
        "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} {params.method} "
        "{params.given} --log {log.messages:q}"
