# Merge the experts of a Mixture-of-Experts model, compress what is left, win the quality back, and prove what was kept.
# This file is the table of contents; each rule stands in rules/ under the name of its script in workflow_scripts/.

from snakemake.utils import min_version

min_version("9.27")


# A configuration given on the command line stands alone: nothing of the embedded default leaks into it.
if not workflow.config_settings.configfiles:

    configfile: "config.yaml"


include: "rules/common.smk"
# data and model
include: "rules/generate_data.smk"
include: "rules/prepare_data.smk"
include: "rules/prepare.smk"
include: "rules/finetune.smk" if FINETUNED else "rules/take_full.smk"
# what merging needs to know
include: "rules/permute.smk"
include: "rules/collect_routing.smk"
include: "rules/collect_gradients.smk"
include: "rules/cache_teacher.smk"
# merge, compress, recover
include: "rules/group.smk"
include: "rules/prune.smk"
include: "rules/merge.smk"
include: "rules/reduce.smk"
include: "rules/recover.smk"
include: "rules/compress.smk"
# measure and show
include: "rules/evaluate.smk"
include: "rules/profile_cost.smk"
include: "rules/summarise.smk"
include: "rules/draw_report.smk"
include: "rules/publish.smk"


rule all:
    default_target: True
    input:
        PLACES.report,
        PLACES.published,


onstart:
    take_lock()
    keep_libraries_loaded()
    schedule_when_jobs_end()


onsuccess:
    forkserver.stop()
    show_ending()


onerror:
    forkserver.stop()
