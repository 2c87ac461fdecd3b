rule finetune:
    # Train the full model on the task, every expert and the router.
    input:
        model=f"{BASE}/model",
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
    output:
        model=directory(RUN.full),
        training=RUN.table("full", "training"),
        selection=RUN.table("full", "selection"),
    log:
        **logs("finetune", "{task}-seed{seed}"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["finetune"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        **job("finetune", TOGETHER),
        device=DEVICE,
        state=f"{STATE}/{{task}}/seed{{seed}}/full",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("finetune"),
        dense="",
        limits=limits(),
    message:
        "fine-tune the full model on {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
            "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
            "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
            "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} "
            "{params.dense} "
        )


use rule finetune as finetune_dense with:
    # The same of a model without experts, to compare with.
    input:
        model=f"{BASE}/dense",
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
    output:
        model=directory(RUN.checkpoint("{variant}/1e/finetuned")),
        training=RUN.table("{variant}/1e/finetuned", "training"),
        selection=RUN.table("{variant}/1e/finetuned", "selection"),
    log:
        **logs("finetune", "{task}-seed{seed}-{variant}"),
    params:
        **job("finetune", TOGETHER),
        device=DEVICE,
        state=f"{STATE}/{{task}}/seed{{seed}}/{{variant}}",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("finetune"),
        dense="--dense",
        limits=limits(),
    message:
        "fine-tune the dense model on {wildcards.task}, seed {wildcards.seed}"
