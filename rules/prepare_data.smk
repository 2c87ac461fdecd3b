rule prepare_data:
    # Raw rows become prompts, targets and choices; a slice of the training set is set aside to select checkpoints on.
    input:
        unpack(raw_data),
    output:
        train=RUN.examples("train"),
        selection=RUN.examples("selection"),
        validation=RUN.examples("validation"),
    log:
        **logs("prepare_data", "{task}-seed{seed}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=20,
    params:
        **job("prepare_data", LIGHT),
        task=lambda wildcards: TASKS[wildcards.task],
        described=lambda wildcards: digest_of(described_in(TASKS[wildcards.task])),
        source=raw_source,
        protocol=as_flags({"protocol": CONFIG["evaluate"]["protocol"]}),
        options=data_options("train_rows", "validation_rows", "selection_rows"),
    message:
        "prepare the examples of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--task={params.task:q} {params.source} --seed {wildcards.seed} "
            "--train {output.train:q} --selection {output.selection:q} --validation {output.validation:q} "
            "{params.options} {params.protocol} "
        )
