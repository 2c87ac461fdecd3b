rule draw_report:
    # The report, one file with every figure and table inside.
    input:
        unpack(everything_measured),
        summary=PLACES.summary,
    output:
        report=PLACES.report,
    log:
        **logs("draw_report", "all"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        **job("draw_report", LIGHT),
        drawn_with=digest_of(*REPORT_FILES),
        results=lambda wildcards: RESULTS,
        benchmarks=PLACES.benchmarks,
        runs=RUN_LIST,
        configuration=CONFIG_JSON,
    message:
        "draw the report"
    shell:
        command(
            "--results {params.results:q} --runs {params.runs:q} --configuration {params.configuration:q} "
            "--benchmarks {params.benchmarks:q} --summary {input.summary:q} --report {output.report:q} "
        )
