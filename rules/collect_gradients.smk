rule collect_gradients:
    # Gradients and their squares on the calibration examples, for the methods that ask for them.
    input:
        model=RUN.full,
        train=RUN.examples("train"),
    output:
        gradients=RUN.gradients,
    log:
        **logs("collect_gradients", "{task}-seed{seed}"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["calibration"]["threads"]
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=GPUS,
    params:
        **job("collect_gradients"),
        device=DEVICE,
        tokens=TOKENS,
        options=as_flags(
            {key: CONFIG["calibration"][key] for key in ("samples", "threads")}
        ),
        limits=limits(),
    message:
        "collect gradients of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --train {input.train:q} --seed {wildcards.seed} --device={params.device:q} "
            "--gradients {output.gradients:q} --tokens {params.tokens:q} {params.limits} {params.options} "
        )
