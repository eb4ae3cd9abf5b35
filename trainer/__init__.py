"""The trainer: from a run file to a distilled student.

In the order of the data flow:

sources       samples from files and datasets
tokenization  a sample as token ids of the student and of every teacher
query         score requests to the teachers, prefetched ahead of the training step
signals       a teacher's scores as a target, or as labels of an auxiliary loss
fusion        the targets of all teachers as one target per position
losses        the loss and its gradient
student       the model that is trained
training      steps, checkpoints, resuming, several processes
evaluation    held-out text, agreement with teachers, export
telemetry     events, metrics.jsonl, experiment trackers
report        charts and figures of a finished run

`cli` has the commands, `config` the run file, `records` the types that pass between the stages.
"""
