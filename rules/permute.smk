rule permute:
    # Align the neurons of every expert to those of expert 0: the same function, in an order that can be averaged.
    input:
        unpack(alignment_input),
    output:
        model=directory(f"{RUN}/permuted{{how}}"),
        permutation=f"{RUN}/permutation{{how}}.parquet",
    log:
        messages=f"{LOGS}/permute/{{task}}-seed{{seed}}{{how}}.log",
        usage=f"{BENCHMARKS}/permute/{{task}}-seed{{seed}}{{how}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        code=code("permute"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("permute"),
        given=given("routing"),
        alignment=lambda wildcards: (wildcards.how or "-weight")[1:],
        options=as_flags({"threads": CONFIG["merge"]["threads"]}),
    message:
        "align the experts of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --alignment={params.alignment:q} "
        "--out {output.model:q} --permutation {output.permutation:q} {params.options} "
        "{params.given} --log {log.messages:q}"
