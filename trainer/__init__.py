"""What step should the student take?

`config` is the run file. `data` reads samples, `targets` asks, aligns and fuses ahead of the step, `learning` is the
student and its step, `loop` the run from beginning to end, `results` what came of it, `reports` what is written down,
`commands` the rest of what `cli` offers.
"""
