rule publish:
    # Everything goes to MLflow, once, from one process; publishing again replaces.
    input:
        unpack(everything_measured),
        summary=f"{RESULTS}/summary.parquet",
    output:
        marker=f"{RESULTS}/published.json",
    log:
        messages=f"{LOGS}/publish/all.log",
        usage=f"{BENCHMARKS}/publish/all.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        code=code("publish"),
        launcher=LAUNCHER,
        launch=FRESH,
        script=script("publish"),
        store=STORE,
        results=lambda wildcards: RESULTS,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "publish to MLflow"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
        "--summary {input.summary:q} --marker {output.marker:q} "
        "--log {log.messages:q}"
