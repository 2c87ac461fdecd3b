# Its groups are those that are left, not groups made from routing statistics.
ruleorder: prune > group


rule prune:
    # Task-specific expert pruning: the base model is fine-tuned while the experts that the task hardly uses fall away.
    input:
        model=f"{RESULTS}/base/seed{{seed}}/model",
        train=f"{RUN}/examples/train.parquet",
        selection=f"{RUN}/examples/selection.parquet",
    output:
        model=directory(f"{RUN}/{{variant}}/{{experts}}e/pruned"),
        groups=f"{RUN}/{{variant}}/{{experts}}e/groups.parquet",
        training=f"{RUN}/{{variant}}/{{experts}}e/pruned_training/training.parquet",
        selection=f"{RUN}/{{variant}}/{{experts}}e/pruned_training/selection.parquet",
    log:
        messages=f"{LOGS}/prune/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.log",
        usage=f"{BENCHMARKS}/prune/{{task}}-seed{{seed}}-{{variant}}-{{experts}}e.tsv",
    wildcard_constraints:
        variant="|".join(map(re.escape, TASK_SPECIFIC)) or "(?!)",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["finetune"]["threads"] * PROCESSES
    resources:
        mem_mb=3000 * PROCESSES,
        runtime=600,
        gpu=GPUS * PROCESSES,
    params:
        code=code("prune"),
        launcher=LAUNCHER,
        launch=TOGETHER,
        script=script("prune"),
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
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --task={params.task:q} --train {input.train:q} "
        "--selection {input.selection:q} --seed {wildcards.seed} --device={params.device:q} "
        "--experts {wildcards.experts} --groups {output.groups:q} "
        "--out {output.model:q} --training {output.training:q} --selected {output.selection:q} "
        "--state {params.state:q} --tokens {params.tokens:q} {params.limits} {params.options} {params.pruning} "
        "--log {log.messages:q}"
