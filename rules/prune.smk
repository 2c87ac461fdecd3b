# Its groups are those that are left, not groups made from routing statistics.
ruleorder: prune > group


rule prune:
    # Task-specific expert pruning: the base model is fine-tuned while the experts that the task hardly uses fall away.
    input:
        model=f"{BASE}/model",
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
    output:
        model=directory(RUN.checkpoint(own("pruned"))),
        groups=RUN.groups("{variant}", "{experts}"),
        training=RUN.table(own("pruned"), "training"),
        selection=RUN.table(own("pruned"), "selection"),
    log:
        **logs("prune", "{task}-seed{seed}-{variant}-{experts}e"),
    wildcard_constraints:
        variant="|".join(map(re.escape, TASK_SPECIFIC)) or "(?!)",
    priority: LONGEST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["finetune"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        **job("prune", TOGETHER),
        device=DEVICE,
        state=f"{STATE}/{{task}}/seed{{seed}}/{{variant}}-{{experts}}e-pruned",
        tokens=TOKENS,
        task=lambda wildcards: TASKS[wildcards.task],
        options=options("finetune"),
        pruning=as_flags(
            {
                **CONFIG["prune"],
                "exclude_layers": CONFIG["merge"]["exclude_layers"],
            }
        ),
        limits=limits(),
    message:
        "fine-tune on {wildcards.task} while all but {wildcards.experts} experts fall away, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
            "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
            "--experts {wildcards.experts} --groups {output.groups:q} "
            "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
            "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} {params.pruning} "
        )
