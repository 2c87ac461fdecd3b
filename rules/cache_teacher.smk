rule cache_teacher:
    # The full model answers what its students learn from once; what is kept here serves them all.
    input:
        model=RUN.full,
        train=RUN.examples("train"),
    output:
        teacher=directory(RUN.teacher),
    log:
        **logs("cache_teacher", "{task}-seed{seed}"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["evaluate"]["threads"]
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=GPUS,
    params:
        **job("cache_teacher"),
        device=DEVICE,
        tokens=TOKENS,
        options=as_flags(
            {key: CONFIG["evaluate"][key] for key in ("batch_size", "threads")}
        ),
        limits=limits(),
        students=students,
    message:
        "cache the teacher of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --train {input.train:q} --device={params.device:q} "
            "--students {params.students:q} --seed {wildcards.seed} "
            "--out {output.teacher:q} --tokens {params.tokens:q} {params.limits} {params.options} "
        )
