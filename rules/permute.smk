rule permute:
    # Align the neurons of every expert to those of expert 0: the same function, in an order that can be averaged.
    input:
        unpack(alignment_input),
    output:
        model=directory(RUN.permuted("{how}")),
        permutation=RUN.permutation("{how}"),
    log:
        **logs("permute", "{task}-seed{seed}{how}"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        **job("permute"),
        given=given("routing"),
        alignment=lambda wildcards: (wildcards.how or "-weight")[1:],
        options=as_flags({"threads": CONFIG["merge"]["threads"]}),
    message:
        "align the experts of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --alignment={params.alignment:q} "
            "--out {output.model:q} --permutation {output.permutation:q} {params.options} "
            "{params.given}"
        )
