rule merge:
    # Every group becomes one expert, stored once; the router keeps its outputs and is redirected.
    input:
        unpack(grouping_input),
        groups=RUN.groups("{variant}", "{experts}"),
    output:
        model=directory(RUN.checkpoint(own("merged"))),
    log:
        **logs("merge", "{task}-seed{seed}-{variant}-{experts}e"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        **job("merge"),
        given=given("gradients", "permutation"),
        method=method_options("merge", "alignment"),
        options=as_flags({"threads": CONFIG["merge"]["threads"]}),
    message:
        "merge the experts of {wildcards.task} by {wildcards.variant} to {wildcards.experts}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --groups {input.groups:q} --routing {input.routing:q} --seed {wildcards.seed} "
            "--out {output.model:q} {params.method} {params.options} "
            "{params.given}"
        )
