rule collect_gradients:
    # Gradients and their squares on the calibration examples, for the methods that ask for them.
    input:
        model=f"{RUN}/full",
        train=f"{RUN}/examples/train.parquet",
    output:
        gradients=f"{RUN}/gradients.safetensors",
    log:
        messages=f"{LOGS}/collect_gradients/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/collect_gradients/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["calibration"]["threads"]
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=GPUS,
    params:
        code=code("collect_gradients"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("collect_gradients"),
        device=DEVICE,
        tokens=TOKENS,
        options=as_flags(
            {key: CONFIG["calibration"][key] for key in ("samples", "threads")}
        ),
        limits=limits(),
    message:
        "collect gradients of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --train {input.train:q} --seed {wildcards.seed} --device={params.device:q} "
        "--gradients {output.gradients:q} --tokens {params.tokens:q} {params.limits} {params.options} "
        "--log {log.messages:q}"
