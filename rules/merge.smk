rule merge:
    # Every group becomes one expert, stored once; the router keeps its outputs and is redirected.
    input:
        unpack(grouping_input),
        groups=f"{RUN}/{{variant}}/{{experts}}e/groups.parquet",
    output:
        model=directory(f"{RUN}/{{variant}}/{{experts}}e/merged"),
    log:
        messages=f"{LOGS}/merge/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.log",
        usage=f"{BENCHMARKS}/merge/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        code=code("merge"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("merge"),
        given=given("gradients", "permutation"),
        method=method_options("merge", "alignment"),
        options=as_flags({"threads": CONFIG["merge"]["threads"]}),
    message:
        "merge the experts of {wildcards.task} by {wildcards.variant} to {wildcards.experts}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --groups {input.groups:q} --routing {input.routing:q} --seed {wildcards.seed} "
        "--out {output.model:q} {params.method} {params.options} "
        "{params.given} --log {log.messages:q}"
