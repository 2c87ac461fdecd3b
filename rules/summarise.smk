rule summarise:
    # One table of everything, and the report.
    input:
        unpack(everything_measured),
    output:
        summary=PLACES.summary,
        report=PLACES.report,
    log:
        **logs("summarise", "all"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        **job("summarise", FRESH),
        drawn_with=digest_of(*REPORT_FILES),
        results=lambda wildcards: RESULTS,
        benchmarks=PLACES.benchmarks,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "summarise and report"
    shell:
        command(
            "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
            "--benchmarks {params.benchmarks:q} --summary {output.summary:q} --report {output.report:q} "
        )
