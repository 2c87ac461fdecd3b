rule group:
    # Which experts of each layer are merged into which group.
    input:
        unpack(grouping_input),
    output:
        similarity=RUN.similarity("{variant}", "{experts}"),
        groups=RUN.groups("{variant}", "{experts}"),
    log:
        **logs("group", "{task}-seed{seed}-{variant}-{experts}e"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        **job("group"),
        given=given("gradients", "permutation"),
        method=method_options("similarity", "grouping", "budget", "linkage", "merge"),
        options=grouping_options,
    message:
        "group the experts of {wildcards.task} for {wildcards.variant}, {wildcards.experts} on average, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --routing {input.routing:q} --seed {wildcards.seed} "
            "--experts {wildcards.experts} --similarity-table {output.similarity:q} --groups {output.groups:q} "
            "{params.method} {params.options} "
            "{params.given}"
        )
