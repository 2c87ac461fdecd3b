rule group:
    # Which experts of each layer are merged into which group.
    input:
        unpack(grouping_input),
    output:
        similarity=f"{RUN}/{{variant}}/{{experts}}e/similarity.parquet",
        groups=f"{RUN}/{{variant}}/{{experts}}e/groups.parquet",
    log:
        messages=f"{LOGS}/group/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.log",
        usage=f"{BENCHMARKS}/group/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["merge"]["threads"]
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        code=code("group"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("group"),
        given=given("gradients", "permutation"),
        method=method_options("similarity", "grouping", "budget", "linkage", "merge"),
        options=grouping_options,
    message:
        "group the experts of {wildcards.task} for {wildcards.variant}, {wildcards.experts} on average, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --routing {input.routing:q} --seed {wildcards.seed} "
        "--experts {wildcards.experts} --similarity-table {output.similarity:q} --groups {output.groups:q} "
        "{params.method} {params.options} "
        "{params.given} --log {log.messages:q}"
