rule take_full:
    # Zero-shot: the checkpoint itself is the full model; nothing is trained.
    input:
        model=f"{BASE}/model",
    output:
        model=directory(RUN.full),
    log:
        **logs("take_full", "{task}-seed{seed}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        **job("take_full", LIGHT),
    message:
        "take the checkpoint as the full model of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command("--model {input.model:q} --out {output.model:q} ")
