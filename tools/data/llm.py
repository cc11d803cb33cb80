"""The LLM that writes or judges data: any server with OpenAI's chat API, asked by many threads,
through errors of every kind."""

import argparse
import contextlib
import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from lib.errors import first_line, stop
from lib.settings import positive, whole
from tools.data.commands import add_options, digest, not_negative


class Unanswered(Exception):
    """The server gave no answer to one question."""


class Declined(Unanswered):
    """It refuses this one: too long, say, or against its rules."""


class Refused(Unanswered):
    """It will answer no other question either: a wrong key, model or address."""


def retry_after(value):
    """Seconds that a Retry-After header asks for: a number of them, or a date (RFC 9110, section
    10.2.3); 0 without one."""
    value = (value or "").strip()
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def without_thoughts(text):
    """An answer without the reasoning before it, <think>...</think>; "" while that still goes on.
    (Some servers leave out the opening tag.)"""
    tag = "(?:think|thinking|thought|reasoning)"
    text = re.sub(rf"(?s)^.*</{tag}>", "", text)
    return re.sub(rf"(?s)<{tag}>.*$", "", text).strip()


# What a server may refuse with HTTP 400, and what it is sent instead, from then on
FORMS = {"max_completion_tokens": "it wants max_completion_tokens in place of max_tokens",
         "temperature": "it allows no temperature: its own is used"}


def send(args, key, question, forms):
    """The LLM's answer to one message of a user: {"text", "finish", "tokens"}. `forms`: the keys of
    FORMS that this server wants. Raises ValueError, in plain words, for what is no answer."""
    body = {"model": args.model, "messages": [{"role": "user", "content": question}],
            "stream": False}
    limit = "max_completion_tokens" if "max_completion_tokens" in forms else "max_tokens"
    body[limit] = args.max_tokens
    if "temperature" not in forms:
        body["temperature"] = args.temperature
    request = urllib.request.Request(args.api_base.rstrip("/") + "/chat/completions",
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if key:  # not to where the server redirects
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=args.timeout) as response:
        said = response.read()
    try:
        reply = json.loads(said)
    except ValueError:
        raise ValueError("the reply is a web page, not JSON: is /v1 missing at the end of "
                         "--api_base?" if said.lstrip()[:1] == b"<" else
                         f"the reply is not JSON: {said[:100]!r}") from None
    if not isinstance(reply, dict) or not reply.get("choices"):
        error = reply.get("error") if isinstance(reply, dict) else None
        error = error.get("message") if isinstance(error, dict) else error
        raise ValueError(f"the server says: {error}" if error else "the reply holds no choices")
    message = reply["choices"][0].get("message") or {}
    text = message.get("content") or ""  # null where the model refuses
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return {"text": text.encode("utf-8", "replace").decode(),
            "finish": reply["choices"][0].get("finish_reason"),
            "tokens": tokens if isinstance(tokens, int) else 0}


def chat(args, question, stopped, forms):
    """`send`, again after rate limits, errors of the server, time-outs, cut connections and what is
    no answer: after 1, 2, 4 ... times --backoff seconds, or what Retry-After says if that is
    longer. Raises Unanswered or Refused."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    failure, attempt = Unanswered, -1
    while attempt < args.retries:
        attempt += 1
        wait = min(60.0, args.backoff * 2**attempt)
        wait *= random.uniform(0.75, 1.0)  # not all workers at once
        try:
            put = set(forms)
            return send(args, key, question, put)
        except urllib.error.HTTPError as error:
            said = error.reason.encode()
            with contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(1000)
            said = " ".join(said.decode(errors="replace").split())[:200]
            problem = f"HTTP {error.code}: {said}"
            if error.code == 404:
                problem += " (is /v1 missing at the end of --api_base, or --model unknown there?)"
            if wanted := next((form for form in FORMS if error.code == 400 and form in said
                               and form not in put), None):
                if wanted not in forms:
                    forms.add(wanted)
                    tqdm.write(f"{args.api_base}: {FORMS[wanted]}")
                attempt -= 1
                continue
            if error.code in (400, 413, 422):
                failure = Declined
                break
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                failure = Refused
                break
            wait = max(wait, retry_after(error.headers.get("Retry-After")))
            if wait > 60 and attempt < args.retries:
                tqdm.write(f"{args.api_base}: HTTP {error.code}: asks for a wait of {wait:.0f} "
                           "seconds")
        except Exception as error:  # the network's, or the reply is something else
            problem = first_line(error)
            if not isinstance(error, ValueError):
                problem = f"{type(error).__name__}: {problem}"
        if attempt < args.retries and stopped.wait(wait):
            break
    raise failure(problem.replace(key, "***") if key else problem)


def ask(args, journal, questions, read, title):
    """`read(answer)` for each of the questions, in their order, whichever is answered first: a
    list, with None where `read` found in none of --tries answers what it looks for, or where the
    server gave none.

    A question is (salt, text): the same text is asked once for each salt. At five questions in a
    row without any answer the run ends; those that the server declines count only while it has
    answered none. Whatever ends it, what has been answered is in the journal, and what is being
    answered is waited for.
    """
    stopped, spent, forms = threading.Event(), Counter(), set()
    results, unanswered, in_a_row = {}, [], 0

    def work(salt, text):
        for attempt in range(args.tries):
            key = digest(args.model, args.temperature, args.max_tokens, salt, text, attempt)
            if key not in journal.answers:
                answer = chat(args, text, stopped, forms)
                journal.add(key, answer)
                spent["tokens"] += answer["tokens"]
            answer = journal.answers[key]
            if (value := read(answer | {"text": without_thoughts(answer["text"])})) is not None:
                return value
            spent["unusable"] += 1

    pool = ThreadPoolExecutor(args.workers)
    futures = {pool.submit(work, *question): question for question in dict.fromkeys(questions)}
    bar = tqdm(total=len(futures), desc=title, dynamic_ncols=True)
    try:
        for future in as_completed(futures):
            try:
                results[futures[future]], in_a_row = future.result(), 0
            except Unanswered as error:
                unanswered.append(error)
                # Declined questions may follow each other: of a run that is continued, only they
                # are asked again. "source" is in every journal.
                answered = len(journal.answers) > 1
                in_a_row += not (answered and isinstance(error, Declined))
                if in_a_row == 5 or isinstance(error, Refused):
                    raise
            bar.set_postfix_str(f"{spent['unusable']} answers unusable, {len(unanswered)} "
                                f"questions unanswered, {spent['tokens']} tokens", refresh=False)
            bar.update()
    except (Unanswered, OSError, KeyboardInterrupt) as error:  # OSError: of the journal's disk
        bar.close()
        stopped.set()
        pool.shutdown(cancel_futures=True)  # waits for the answers under way: they are paid for
        stop(f"{args.api_base}: {first_line(error)}; {len(results)} of {len(futures)} questions "
             f"are answered, and kept in {journal.path}: run this again to continue", code=1)
    bar.close()
    last = f" (the last: {unanswered[-1]})" if unanswered else ""
    unusable = sum(value is None for value in results.values())
    print(f"{title}: {len(futures)} questions, {unusable} without a usable answer, "
          f"{len(unanswered)} unanswered{last}, {spent['tokens']} tokens")
    return [results.get(question) for question in questions]


def address(text):
    """argparse type: the address of a server."""
    if not re.match(r"https?://[^\s/]", text):
        raise argparse.ArgumentTypeError(f"{text} does not begin with http:// or https:// and a "
                                         "server")
    return text


def add_llm(command, temperature, max_tokens):
    """The options of a command that asks an LLM."""
    group = command.add_argument_group(
        "the LLM (its key: the environment variable OPENAI_API_KEY)")
    add_options(
        group,
        ("api_base", "https://api.openai.com/v1", "server with the OpenAI chat API", address),
        ("model", None, "the model's name there", str),
        ("temperature", temperature, "of the sampling", not_negative),
        ("max_tokens", max_tokens, "longest answer, tokens", positive),
        ("workers", 8, "questions at a time; no result depends on it", positive),
        ("timeout", 120.0, "seconds without a byte from the server", not_negative),
        ("retries", 6, "times that a question is sent again after an error", whole),
        ("backoff", 1.0, "seconds before the first of these, doubled each time", not_negative),
        ("tries", 3, "answers to ask for until one is usable", positive),
        ("templates", None, "JSON file with some of the templates actor, reward, rlhf (default: "
         "templates.json, if it is in this folder)", str))
