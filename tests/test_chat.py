"""--chat and --generate say what transformers' own generate() says, on the same template and seed."""

import io
import signal
import subprocess
import sys

import pytest
import torch
from helpers.runs import make_model, make_text, outputs, python, small_tokenizer, start_process
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

import train
from llama3 import sample

SAMPLED = dict(do_sample=True, temperature=0.7, top_p=0.9)
ENDS = [0, 2]  # <|endoftext|>, <|im_end|>


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that holds 128 tokens, with a chat template."""
    folder = make_model(tmp_path_factory.mktemp("chat") / "model", initializer_range=0.5, eos_token_id=2)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """What --chat prints for these lines of a pipe."""

    def call(lines: str, *more: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        flags = [f"--model_id={model}", "--precision=fp32", "--chat", "--max_new_tokens=20", *more]
        assert train.main(flags) == 0
        return capsys.readouterr().out

    return call


class Reference:
    """transformers' own model and template, turn after turn."""

    def __init__(self, folder, seed=0, tokens=20, **options):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.options = GenerationConfig(**options, max_new_tokens=tokens, eos_token_id=ENDS, pad_token_id=0)
        self.messages = []
        set_seed(seed)

    def answer(self, text: str) -> str:
        self.messages.append(dict(role="user", content=text))
        named = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = self.tokenizer.apply_chat_template(self.messages, **named)
        output = self.model.generate(**inputs, generation_config=self.options)
        answer = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append(dict(role="assistant", content=answer))
        return answer


@pytest.mark.parametrize("temperature, options", [("0.7", SAMPLED), ("0", dict(do_sample=False))])
def test_two_turns_are_those_of_transformers_generate(model, talk, temperature, options):
    reference = Reference(model, seed=3, **options)
    expected = [reference.answer(text) for text in ("who is strong?", "the union")]
    assert len(set(expected)) == 2 and all(expected)
    said = talk("who is strong?\nthe union\n", "--seed=3", f"--temperature={temperature}")
    assert said == "".join(f"{answer}\n" for answer in expected)


def test_a_pipe_and_exit(model):
    command = ["train.py", f"--model_id={model}", "--precision=fp32", "--chat"]
    command += ["--max_new_tokens=20", "--temperature=0"]
    done = python(*command, input="who?\n/exit\nnever\n")
    answer = Reference(model, do_sample=False).answer("who?")
    assert done.stdout == f"{answer}\n"


def test_ctrl_c_leaves_without_a_traceback(model):
    command = [sys.executable, "train.py", f"--model_id={model}", "--chat"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with start_process(command, text=True, **pipes) as process:
        said = ""
        while "/exit, Ctrl-D or Ctrl-C leaves" not in said:
            said += (line := process.stderr.readline())
            assert line, said
        process.stdin.write("who?\n")
        process.stdin.flush()
        process.stdout.read(1)  # it answers, and then waits
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0 and "Traceback" not in process.stderr.read()


def test_a_full_context_forgets_the_oldest_turns_and_says_so(model, talk):
    tokenizer = AutoTokenizer.from_pretrained(model)
    question = "the state of the union is strong"
    reference, told = Reference(model, do_sample=False), []
    for _ in range(4):
        messages = [*reference.messages, dict(role="user", content=question)]
        sizes = [
            len(
                tokenizer.apply_chat_template(
                    messages[cut:], add_generation_prompt=True, return_dict=True
                ).input_ids
            )
            for cut in range(0, len(messages), 2)
        ]
        cut = next(turns for turns, size in enumerate(sizes) if size <= 128 - 20)
        told += [f"(the model holds 128 tokens: it forgets the {cut} oldest of your messages)"] if cut else []
        del reference.messages[: 2 * cut]
        told.append(reference.answer(question))
    assert any("forgets" in line for line in told)
    assert talk(f"{question}\n" * 4, "--temperature=0") == "".join(f"{line}\n" for line in told)


def test_a_message_that_is_too_long_is_not_kept(model, talk):
    answer = Reference(model, do_sample=False).answer("who?")
    said = talk(f"{'union ' * 200}\nwho?\n", "--temperature=0")
    assert said == f"(the model holds 128 tokens, this message has more: make it shorter)\n{answer}\n"


@pytest.mark.parametrize("more, options", [([], SAMPLED), (["--temperature=0"], dict(do_sample=False))])
def test_generate_samples_with_a_seed_or_greedily(model, capsys, more, options):
    flags = [f"--model_id={model}", "--precision=fp32", "--generate=the state of", "--max_new_tokens=20"]
    assert train.main([*flags, "--seed=5", *more]) == 0
    reference = Reference(model, seed=5, **options)
    inputs = reference.tokenizer("the state of", return_tensors="pt", return_token_type_ids=False)
    output = reference.model.generate(**inputs, generation_config=reference.options)
    expected = reference.tokenizer.decode(output[0], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{expected}\n"


def test_interrupted_input_ends_the_talk(model):
    def interrupted():
        raise KeyboardInterrupt

    loaded, tokenizer = sample.load(model, "fp32"), AutoTokenizer.from_pretrained(model)
    assert sample.chat(loaded, tokenizer, 4, 0, 0.0, interrupted) is None


def test_a_checkpoint_is_talked_to(model, tmp_path, talk):
    text = make_text(tmp_path / "text.jsonl", documents=10)
    run = [f"--model_id={model}", f"--dataset_id={text}", f"--dataset_path={tmp_path / 'data'}"]
    run.append("--max_seq_len=32")
    assert train.main([*run, "--prepare_data"]) == 0
    step = ["--max_train_steps=1", "--global_batch_size=1", "--learning_rate=0.1", "--precision=fp32"]
    assert train.main([*run, *step, *outputs(tmp_path)]) == 0
    exported = tmp_path / "hf"
    save_dir = f"--save_dir={tmp_path / 'ckpt'}"
    assert train.main(["--export_hf", save_dir, f"--output_path={exported}"]) == 0
    answer = Reference(exported, do_sample=False).answer("who?")
    assert answer != Reference(model, do_sample=False).answer("who?")
    said = talk("who?\n", "--temperature=0", save_dir, "--resume_from=last")
    assert said.splitlines()[-len(answer.splitlines()) :] == answer.splitlines()
