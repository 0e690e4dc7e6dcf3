"""The data of a training: files -> records -> examples -> token rows with labels -> cut -> packed."""
