"""What step should the student take?

`config` is the run file, `data` the windows of text, `pipeline` asks, aligns and fuses ahead of the step,
`losses` and `step` move the student, `loop` is the run from beginning to end, `cli` the commands.
"""
