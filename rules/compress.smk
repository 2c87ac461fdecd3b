rule compress:
    # Split every expert into low-rank and sparse parts, and prune the sparse part row by row while training.
    input:
        model=before_compression,
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
        teacher=teacher("compress"),
        routing=whitening_input,
    output:
        model=directory(RUN.checkpoint(own("compressed"))),
        training=RUN.table(own("compressed"), "training"),
        selection=RUN.table(own("compressed"), "selection"),
    log:
        **logs("compress", "{task}-seed{seed}-{variant}-{experts}e"),
    priority: LONGEST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["compress"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        **job("compress", TOGETHER),
        device=DEVICE,
        given=given("teacher", "routing"),
        state=f"{STATE}/{{task}}/seed{{seed}}/{{variant}}-{{experts}}e-compressed",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("compress"),
        method=method_options("distillation_weight", "decomposition"),
        limits=limits(),
        excluded=as_flags({"exclude_layers": CONFIG["merge"]["exclude_layers"]}),
    message:
        "compress {wildcards.variant} {wildcards.experts}e on {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
            "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
            "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
            "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} {params.method} {params.excluded} "
            "{params.given}"
        )
