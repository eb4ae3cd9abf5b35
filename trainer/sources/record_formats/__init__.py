"""Record formats: how the columns of a line or row become a text or a chat.

RECORD_FORMATS is the registry: name -> "module:class" of a trainer.sources.record_formats.base.RecordFormat. A source
has the format whose columns it has; `record_format` in its section names one if several fit.
"""

RECORD_FORMATS: dict[str, str] = {
    "text": "trainer.sources.record_formats.text:TextFormat",
    "messages": "trainer.sources.record_formats.messages:MessagesFormat",
    "conversations": "trainer.sources.record_formats.messages:ConversationsFormat",
    "prompt_completion": "trainer.sources.record_formats.prompt_completion:PromptCompletionFormat",
    "instruction": "trainer.sources.record_formats.instruction:InstructionFormat",
    "question_answer": "trainer.sources.record_formats.question_answer:QuestionAnswerFormat",
    "template": "trainer.sources.record_formats.template:TemplateFormat",
}
