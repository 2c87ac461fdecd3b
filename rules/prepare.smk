rule prepare:
    # Take the configured checkpoint, or build a model, train its tokenizer and pre-train it.
    input:
        unpack(pretraining_input(CHECKPOINT)),
    output:
        model=directory(f"{BASE}/model"),
        training=PLACES.pretraining("{seed}"),
    log:
        **logs("prepare", "seed{seed}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["pretrain"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        **job("prepare", TOGETHER),
        device=DEVICE,
        state=f"{STATE}/base/seed{{seed}}",
        source=model_source(CHECKPOINT),
        options=pretraining_options(CHECKPOINT),
    message:
        "prepare the base model, seed {wildcards.seed}"
    shell:
        command(
            "{params.source} --seed {wildcards.seed} --device={params.device:q} "
            "--model {output.model:q} --training {output.training:q} --state {params.state:q} "
            "{params.options} "
        )


use rule prepare as prepare_dense with:
    # The same without experts, to compare with.
    input:
        unpack(pretraining_input(DENSE_CHECKPOINT)),
    output:
        model=directory(f"{BASE}/dense"),
        training=PLACES.pretraining("{seed}", dense=True),
    log:
        **logs("prepare", "seed{seed}-dense"),
    params:
        **job("prepare", TOGETHER),
        device=DEVICE,
        state=f"{STATE}/base/seed{{seed}}-dense",
        source=model_source(DENSE_CHECKPOINT, dense=True),
        options=pretraining_options(DENSE_CHECKPOINT),
    message:
        "prepare the dense model, seed {wildcards.seed}"
