rule recover:
    # Train the merged model on, routers frozen, with the full model as teacher.
    input:
        model=before_recovery,
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
        teacher=teacher("recover"),
    output:
        model=directory(RUN.checkpoint(own("recovered"))),
        training=RUN.table(own("recovered"), "training"),
        selection=RUN.table(own("recovered"), "selection"),
    log:
        **logs("recover", "{task}-seed{seed}-{variant}-{experts}e"),
    priority: LONG
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["recover"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        **job("recover", TOGETHER),
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
        command(
            "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
            "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
            "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
            "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} {params.method} "
            "{params.given}"
        )
