"""From files to samples as one model reads them: documents, windows, chats, and their order."""
