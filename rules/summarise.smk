rule summarise:
    # One table of everything, and the report.
    input:
        unpack(everything_measured),
    output:
        summary=f"{RESULTS}/summary.parquet",
        report=f"{RESULTS}/report.html",
    log:
        messages=f"{LOGS}/summarise/all.log",
        usage=f"{BENCHMARKS}/summarise/all.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        code=code("summarise"),
        launcher=LAUNCHER,
        launch=FRESH,
        script=script("summarise"),
        drawn_with=digest_of(*REPORT_FILES),
        results=lambda wildcards: RESULTS,
        benchmarks=BENCHMARKS,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "summarise and report"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
        "--benchmarks {params.benchmarks:q} --summary {output.summary:q} --report {output.report:q} "
        "--log {log.messages:q}"
