rule publish:
    # Everything goes to MLflow, once, from one process; publishing again replaces.
    input:
        unpack(everything_measured),
        summary=PLACES.summary,
    output:
        marker=PLACES.published,
    log:
        **logs("publish", "all"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        **job("publish", LIGHT),
        store=STORE,
        results=lambda wildcards: RESULTS,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "publish to MLflow"
    shell:
        command(
            "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
            "--summary {input.summary:q} --marker {output.marker:q} "
        )
