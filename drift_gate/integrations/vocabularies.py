"""Student and teacher whose heads differ in size, as embeddings padded to other multiples do."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Words(NamedTuple):
    """Rows of the heads of student and teacher. The words of both are the leading `shared`."""

    student: int
    teacher: int

    @property
    def shared(self) -> int:
        return min(self)

    @property
    def differ(self) -> bool:
        return self.student != self.teacher


def shared_words(student: Any, teacher: Any, tokenizer: Any, theirs: Callable[[], Any]) -> Words:
    """The words of two models that read one tokenizer.

    Args:
        student, teacher: models of transformers.
        tokenizer: the student's.
        theirs: gives the teacher's, or None where it is not known; asked where the heads differ.

    Raises:
        ValueError: the heads differ in size, and so do the words: the tokenizer has more than both
            heads, or the teacher's tokenizer numbers a word otherwise.
    """
    words = Words(*(x.config.get_text_config().vocab_size for x in (student, teacher)))
    if not words.differ:
        return words
    if len(tokenizer) > words.shared:
        raise ValueError(
            f"student and teacher must both have the tokenizer's {len(tokenizer)} words; got "
            f"vocab_size {words.student} and {words.teacher} (TRL's GOLD trains over other "
            "tokenizers)"
        )
    known = theirs()
    other = {} if known is None else known.get_vocab()
    for word, i in tokenizer.get_vocab().items():
        if other.get(word, i) != i:
            raise ValueError(
                "teacher_model must have the student's tokenizer where their vocab_size differ "
                f"({words.teacher} and {words.student}); got the id {other[word]} for {word!r}, "
                f"the student's is {i} (TRL's GOLD trains over other tokenizers)"
            )
    return words


def tokenizer_of(model: Any, args: Any) -> Any:
    """The tokenizer beside a model that was loaded from somewhere; None where there is none."""
    from transformers import AutoTokenizer

    place = model.config.name_or_path
    if not place:
        return None
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as reason:
        logger.warning("no tokenizer of the teacher to compare: %s", reason)
        return None
