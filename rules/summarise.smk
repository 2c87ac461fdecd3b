rule summarise:
    # One table of everything, and the report.
    input:
        unpack(everything_measured),
        template=f"{workflow.basedir}/mcsmoe/report/templates/report.html.j2",
        published=[
            f"{workflow.basedir}/mcsmoe/report/published/{name}.csv"
            for name in ("scores", "examples")
        ],
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
        launch=FRESH,
        script=script("summarise"),
        results=lambda wildcards: RESULTS,
        benchmarks=BENCHMARKS,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "summarise and report"
    shell:
        "{params.launch} --usage {log.usage:q} {params.script:q} "
        "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
        "--benchmarks {params.benchmarks:q} --summary {output.summary:q} --report {output.report:q} "
        "--log {log.messages:q}"
