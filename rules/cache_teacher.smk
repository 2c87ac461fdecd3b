rule cache_teacher:
    # The full model answers the training set once; every student learns from what is kept here.
    input:
        model=f"{RUN}/full",
        train=f"{RUN}/examples/train.parquet",
    output:
        teacher=directory(f"{RUN}/teacher"),
    log:
        messages=f"{LOGS}/cache_teacher/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/cache_teacher/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["evaluate"]["threads"]
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=GPUS,
    params:
        code=code("cache_teacher"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("cache_teacher"),
        device=DEVICE,
        tokens=TOKENS,
        options=as_flags(
            {key: CONFIG["evaluate"][key] for key in ("batch_size", "threads")}
        ),
        limits=limits(),
    message:
        "cache the teacher of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --train {input.train:q} --device={params.device:q} "
        "--out {output.teacher:q} --tokens {params.tokens:q} {params.limits} {params.options} "
        "--log {log.messages:q}"
