rule take_full:
    # Zero-shot: the checkpoint itself is the full model; nothing is trained.
    input:
        model=f"{RESULTS}/base/seed{{seed}}/model",
    output:
        model=directory(f"{RUN}/full"),
    log:
        messages=f"{LOGS}/take_full/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/take_full/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        code=code("take_full"),
        launcher=LAUNCHER,
        launch=FRESH,
        script=script("take_full"),
    message:
        "take the checkpoint as the full model of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --out {output.model:q} "
        "--log {log.messages:q}"
