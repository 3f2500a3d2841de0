"""Distil a language model into a smaller one: four divergences, on the student's own samples and on the teacher's.

    python recipes/distill.py --config recipes/distill.yaml       # or, on several processes:
    accelerate launch --config_file accelerate_config.yaml recipes/distill.py --config recipes/distill.yaml

With your own: --teacher_name_or_path BIG --model_name_or_path SMALL --prompts FILE --divergences reverse_kl --samplers
student; any two causal LMs with one vocabulary. Per token the loss is a divergence between the two whole next-token
distributions, from hidden states: no logits are held. As in GKD (arXiv 2306.13649) no gradient flows through sampling.

Without them: a made-up language, where each of 32 prompts has two to four right answers, a teacher that knows them,
and a student with too few weights to (872). What it says is enumerated, not sampled. 2026-11-27, 3 minutes of one CPU
core. Mass on no right answer, and share of right answers with at least 1 % (student before: 82 %, 43 %; teacher: 0.1
%, all): forward KL on the teacher's text 59 % and 73 %: it spreads, over wrong answers too. Reverse KL on the
student's text 31 % and 32 %: it drops two answers of three and says its favourite. jsd and skew lie between: 35 % and
51 %, 35 % and 56 % on the teacher's text. Forward KL on the student's own text is the worst of all, 92 %: it copies
what the teacher says after beginnings that no teacher would write. recipes/distill_modes.png shows it.
"""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from klft import FrozenReference, LMHead, causal_inputs, hidden_states, linear_divergence, token_logps, token_scores
from klft.arguments import check_positive, check_writable, one_line_errors, parse_arguments
from klft.diagnostics.loading import quiet, read_prompts
from klft.exits import exit_codes
from klft.generation import Completions, sample_completions
from klft.loading import load_model, load_tokenizer
from klft.models import check_tokenizers, vocab_size
from klft.prompts import encode_prompts, eos_ids, pad, pad_id
from klft.scores import check_temperature

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
SAMPLERS = ("student", "teacher")

# The made-up language: prompts of two words, answers of three, all of 24 words.
PROMPTS, PROMPT_WORDS, ANSWER_WORDS = 32, 2, 3
WORDS = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "ao"]
ANSWER_PROBABILITIES = {2: (0.6, 0.4), 3: (0.5, 0.3, 0.2), 4: (0.4, 0.3, 0.2, 0.1)}


@dataclass
class Settings:
    """Fields of distill.yaml."""

    teacher_name_or_path: str | None = None
    model_name_or_path: str | None = None
    prompts: str | None = None
    divergences: list[str] = field(default_factory=lambda: list(DIVERGENCES))
    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS))
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-2
    max_prompt_length: int = 512
    max_new_tokens: int = 4
    temperature: float = 1.0
    seed: int = 0
    processes: int | None = None
    output_dir: str = "runs/distill"
    smoke: bool = False


@dataclass
class Language:
    """All right answers: token ids of prompt and answer, the answer's probability, and which prompt it belongs to."""

    ids: torch.Tensor  # [answers, tokens]
    probabilities: torch.Tensor  # [answers]
    prompt_numbers: torch.Tensor  # [answers]

    def answer_logps(self, model: Any) -> torch.Tensor:
        """Log-probability [answers] that the model gives each whole answer, its end included."""
        logits = model(input_ids=self.ids).logits[:, PROMPT_WORDS - 1 : -1]
        return token_logps(logits, self.ids[:, PROMPT_WORDS:]).sum(-1)

    def by_prompt(self, values: torch.Tensor) -> torch.Tensor:
        """Values [answers] as a table [prompts, 4], the largest first, zeros where there are fewer answers."""
        rows = [values[self.prompt_numbers == number] for number in range(PROMPTS)]
        return torch.stack([torch.cat([row.sort(descending=True).values, torch.zeros(4)])[:4] for row in rows])


# --- the made-up language, its teacher and its student ---------------------------------------------------------------


def make_language() -> tuple[Language, list[str], PreTrainedTokenizerFast]:
    """Draw the language, which is always the same: its right answers, its prompts and its tokenizer."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

    rng = random.Random(0)
    texts, probabilities, prompt_numbers, prompts = [], [], [], []
    while len(prompts) < PROMPTS:
        prompt = " ".join(rng.choices(WORDS, k=PROMPT_WORDS))
        if prompt in prompts:
            continue
        answers = ANSWER_PROBABILITIES[rng.choice((2, 3, 4))]
        # The answers of one prompt begin with different words, so the first word decides which one it is.
        for first_word, probability in zip(rng.sample(WORDS, len(answers)), answers, strict=True):
            answer = " ".join([first_word, *rng.choices(WORDS, k=ANSWER_WORDS - 1)])
            texts.append(f"{prompt} {answer} <eos>")
            probabilities.append(probability)
            prompt_numbers.append(len(prompts))
        prompts.append(prompt)

    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    language = Language(ids, torch.tensor(probabilities), prompt_numbers=torch.tensor(prompt_numbers))
    return language, prompts, tokenizer


def write_language(folder: Path, smoke: bool) -> None:
    """Write prompts.txt and both models with their tokenizers, as one would have them of a real language."""
    language, prompts, tokenizer = make_language()
    (folder / "prompts.txt").write_text("\n".join(prompts))
    for name, hidden_size, layers, steps in (("teacher", 64, 2, 600), ("student", 8, 1, 150)):
        tokenizer.save_pretrained(folder / name)
        train_model(folder / name, language, hidden_size=hidden_size, layers=layers, steps=20 if smoke else steps)


def train_model(folder: Path, language: Language, *, hidden_size: int, layers: int, steps: int) -> None:
    """Train a small Llama on all answers with their exact probabilities, and save it."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 8,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(layers)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2 / hidden_size**0.8, weight_decay=0.0)
    for _ in range(steps):
        loss = -(language.probabilities * language.answer_logps(model)).sum() / PROMPTS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


# --- distillation ----------------------------------------------------------------------------------------------------


class Distillation:
    """The two models and the prompts, and how completions are drawn from one and scored by both."""

    def __init__(self, settings: Settings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        student_name, teacher_name = str(settings.model_name_or_path), str(settings.teacher_name_or_path)
        self.tokenizer = load_tokenizer(student_name, "student")
        check_tokenizers(self.tokenizer, load_tokenizer(teacher_name, "teacher"))
        device = accelerator.device
        self.student: Any = load_model(student_name, "student").to(device)
        self.teacher: Any = load_model(teacher_name, "teacher").to(device)
        self.reference = FrozenReference(self.teacher)

        # Heads are often padded beyond the tokenizer's ids, to different sizes: only ids that both have are used.
        self.vocabulary = min(vocab_size(self.student), self.reference.vocab_size)
        prompts = list(read_prompts(str(settings.prompts))["prompt"])
        self.prompts = encode_prompts(self.tokenizer, prompts, max_length=settings.max_prompt_length)
        self.generation = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            do_sample=True,
            top_k=0,
            pad_token_id=pad_id(self.tokenizer),
            eos_token_id=eos_ids(self.student, self.tokenizer),
        )

    def sample(self, model: Any, prompts: list[list[int]]) -> Completions:
        """One completion for each prompt, drawn from the distribution that is scored."""
        ids, mask = (part.to(self.accelerator.device) for part in pad(prompts, pad_id(self.tokenizer)))
        completions, _ = sample_completions(model, ids, mask, self.generation, self.vocabulary, self.tokenizer)
        return completions

    def score(self, student: Any, completions: Completions) -> tuple[torch.Tensor, LMHead, torch.Tensor, LMHead]:
        """What predicts each token of the completions: the student's hidden states and head, then the teacher's."""
        ids, attention_mask = completions.inputs
        keep = completions.mask.shape[1] + 1  # the position before a token predicts it
        with hidden_states(student) as kept:
            student(**causal_inputs(student, ids, attention_mask, keep=keep))
        hidden = kept.hidden[:, -keep:-1][completions.mask]
        teacher_hidden, teacher_head = self.reference.hidden(ids, attention_mask, keep=keep)
        teacher_hidden = teacher_hidden[:, :-1][completions.mask]
        head = LMHead.from_model(student)
        return hidden, head.cut(self.vocabulary), teacher_hidden, teacher_head.cut(self.vocabulary)

    def distil(self, divergence: str, sampler: str) -> Any:
        """A copy of the student, trained on one divergence over completions of the student or the teacher."""
        settings, accelerator = self.settings, self.accelerator
        set_seed(settings.seed + accelerator.process_index)  # each process draws completions of its own
        student = copy.deepcopy(self.student)
        optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        student, optimizer = accelerator.prepare(student, optimizer)
        rng = random.Random(settings.seed)  # of the prompts: the same batch everywhere, of which each takes its share
        share = slice(accelerator.process_index, None, accelerator.num_processes)

        for step in range(settings.steps):
            prompts = rng.choices(self.prompts, k=settings.batch_size)[share]
            model = accelerator.unwrap_model(student) if sampler == "student" else self.teacher
            completions = self.sample(model, prompts)

            # Any row of klft's table of divergences; the student is p, so that forward_kl is KL(teacher || student).
            hidden, head, teacher_hidden, teacher_head = self.score(student, completions)
            values = linear_divergence(
                hidden,
                head,
                teacher_hidden,
                teacher_head,
                divergence=divergence,  # pyright: ignore[reportArgumentType] - one of DIVERGENCES
                temperature=settings.temperature,
            )

            # The mean over all processes' tokens. DDP averages gradients, hence the factor.
            tokens: Any = accelerator.reduce(completions.mask.sum())
            loss = values.sum() / tokens * accelerator.num_processes
            accelerator.backward(loss)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - step / settings.steps)
            optimizer.step()
            optimizer.zero_grad()
        return accelerator.unwrap_model(student)

    @torch.no_grad()
    def kls(self, student: Any) -> list[float]:
        """Nats per token: KL(teacher || student) on the teacher's completions, KL(student || teacher) on its own."""
        set_seed(self.settings.seed)
        values = []
        for model, name in ((self.teacher, "forward_kl"), (student, "reverse_kl")):
            completions = self.sample(model, self.prompts[:256])
            hidden, head, teacher_hidden, teacher_head = self.score(student, completions)
            token_ids = completions.completion_ids[completions.mask]
            scores = token_scores(
                hidden, head, token_ids, teacher_hidden, teacher_head, temperature=self.settings.temperature
            )
            values.append(getattr(scores, name).mean().item())
        return values


# --- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def mode_coverage(language: Language, model: Any) -> tuple[list[float], list[float]]:
    """([right answers given at least half as often as they should, at least 1 % of the time, mass on no right answer],
    [mass on the model's favourite right answer, on its second, third, fourth]), means over prompts."""
    mass = language.answer_logps(model).exp().cpu()
    ranked = language.by_prompt(mass).mean(0)
    kept_half = (mass >= language.probabilities / 2).float().mean()
    said = (mass >= 0.01).float().mean()
    return [kept_half.item(), said.item(), 1 - ranked.sum().item()], ranked.tolist()


def draw(bars: dict[str, list[float]], path: Path) -> None:
    """One bar per student: its favourite right answer, its second, third and fourth, and what is none."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6), constrained_layout=True)
    parts = {
        "its favourite right answer": "#0072B2",
        "its second": "#56B4E9",
        "third": "#9AD0F0",
        "fourth": "#CFE8F8",
        "no right answer": "#D55E00",
    }
    widths = torch.tensor([[*masses, 1 - sum(masses)] for masses in bars.values()])  # [bars, parts]
    lefts = widths.cumsum(1) - widths
    for number, (part, color) in enumerate(parts.items()):
        axes.barh(list(bars), widths[:, number].numpy(), left=lefts[:, number].numpy(), label=part, color=color)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="probability, mean over prompts")
    axes.set_title("Where a student that is too small puts its mass")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def check_settings(settings: Settings, accelerator: Accelerator) -> None:
    """Raise ValueError for what cannot work, before anything takes time."""
    check_positive(settings, zero=("seed",))
    check_temperature(settings.temperature)
    if settings.processes not in (None, accelerator.num_processes):
        way_out = "Launch as the second line of this recipe shows, or say --processes with the number you want."
        raise ValueError(f"asked for {settings.processes} process(es), got {accelerator.num_processes}. {way_out}")
    choices = {"divergences": DIVERGENCES, "samplers": SAMPLERS}
    for name, known in choices.items():
        given = getattr(settings, name)
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name}: choose from {', '.join(known)}; got {given}")
    own = [settings.teacher_name_or_path, settings.model_name_or_path, settings.prompts]
    if any(own) and not all(own):
        raise ValueError("teacher_name_or_path, model_name_or_path and prompts go together: name all three, or none")
    if settings.batch_size < accelerator.num_processes:
        raise ValueError(f"batch_size = {settings.batch_size} is less than a prompt for each process")
    check_writable(Path(settings.output_dir) / "distill.png")


def prepare(settings: Settings, accelerator: Accelerator) -> tuple[Distillation, Language | None]:
    """Load both models; of the made-up language, make them first. What can be wrong goes wrong here."""
    check_settings(settings, accelerator)
    language, folder = None, Path(settings.output_dir)
    if settings.smoke:
        settings.steps, settings.batch_size = 3, 8
    if settings.prompts is None:
        # The first process makes the files, the others wait; then all of them read.
        if accelerator.is_main_process:
            write_language(folder, settings.smoke)
        accelerator.wait_for_everyone()
        language, _, _ = make_language()
        settings.teacher_name_or_path, settings.model_name_or_path = f"{folder}/teacher", f"{folder}/student"
        settings.prompts = f"{folder}/prompts.txt"
        language.ids = language.ids.to(accelerator.device)
    return Distillation(settings, accelerator), language


def main(distillation: Distillation, language: Language | None) -> None:
    """Distil once per divergence and sampler, save every student, print the table, draw the picture."""
    settings, accelerator = distillation.settings, distillation.accelerator
    folder = Path(settings.output_dir)
    rows, bars = [], {}
    fits = [(sampler, divergence) for sampler in settings.samplers for divergence in settings.divergences]
    for sampler, divergence in [("", "teacher"), ("", "(before)"), *fits]:
        model = {"teacher": distillation.teacher, "(before)": distillation.student}.get(divergence)
        if model is None:
            model = distillation.distil(divergence, sampler)
            if accelerator.is_main_process:
                model.save_pretrained(folder / f"{divergence}_{sampler}")
                distillation.tokenizer.save_pretrained(folder / f"{divergence}_{sampler}")
        numbers = distillation.kls(model)
        if language is not None:
            coverage, ranked = mode_coverage(language, model)
            numbers += coverage
            bars[f"{divergence}, {sampler}'s text" if sampler else divergence] = ranked
        rows.append([divergence, sampler, *[f"{number:.3f}" for number in numbers]])

    columns = ["minimised", "on text of", "KL(T||S)", "KL(S||T)"]
    table = Table(
        title="T: teacher, S: student, in nats per token. Right answers with half of T's mass, with 1 %; mass on none"
    )
    for column in columns if language is None else [*columns, ">= half", ">= 1 %", "on none"]:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in rows:
        table.add_row(*row)
    if accelerator.is_main_process:
        Console().print(table)
        print(f"Students: {folder}/DIVERGENCE_SAMPLER")
        if bars:
            draw(bars, folder / "distill.png")
            print(f"Picture: {folder}/distill.png")


if __name__ == "__main__":
    with exit_codes():
        with one_line_errors():
            (settings,) = parse_arguments((Settings,))
            quiet()
            accelerator = Accelerator()
            distillation, language = prepare(settings, accelerator=accelerator)
        main(distillation, language)
