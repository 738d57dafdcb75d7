"""lm-evaluation-harness as a task source: record and replay in child processes, with its own code.

`source` and `location` run with us. The other modules run as `<python> -m proctor.catalog.lm_eval.<module>`
in an environment that has lm-eval and none of our dependencies: they import the standard library,
`proctor.records`, `proctor.errors` and lm-eval.
"""
