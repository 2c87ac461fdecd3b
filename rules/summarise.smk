rule summarise:
    # One table of everything.
    input:
        unpack(everything_measured),
    output:
        summary=PLACES.summary,
    log:
        **logs("summarise", "all"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        **job("summarise", LIGHT),
        results=lambda wildcards: RESULTS,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "summarise"
    shell:
        command(
            "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
            "--summary {output.summary:q} "
        )
