rule summarise:
    # One table of everything, and the report.
    input:
        unpack(everything_measured),
        template=f"{workflow.basedir}/mcsmoe/templates/report.html.j2",
    output:
        summary=f"{RESULTS}/summary.parquet",
        report=f"{RESULTS}/report.html",
    log:
        f"{LOGS}/summarise/all.log",
    benchmark:
        f"{BENCHMARKS}/summarise/all.tsv"
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        code=code("summarise"),
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "summarise and report"
    shell:
        "python {SCRIPTS:q}/summarise.py "
        "--results {RESULTS:q} --runs {params.runs:q} --configuration {params.configuration:q} "
        "--benchmarks {BENCHMARKS:q} --summary {output.summary:q} --report {output.report:q} "
        "--log {log:q}"
