"""Mutation tests: tests must fail when a guard is removed.

Run `make test-mutations`, or `python -m tests.mutations NAME`.

Each mutation is applied to a temporary copy of the repository, in which only the tests that guard it are run. A
mutation is killed if each of them fails, and survives otherwise. Before that, the same tests must pass in a copy that
is not mutated.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dfusion-data", "demo-output", "records")
PASSED, FAILED = 0, 1
"""Exit codes of pytest. All others mean that it could not run the tests."""


class MutationError(Exception):
    """A mutation no longer matches the source or the tests, or its tests could not be run."""


@dataclass(frozen=True)
class Mutation:
    """A change at one place in one file that removes a guard.

    name    what is guarded
    file    path from the root of the repository
    source  text that occurs exactly once in the file
    mutant  the replacement
    tests   node ids of the tests that must fail, without parameters
    """

    name: str
    file: str
    source: str
    mutant: str
    tests: tuple[str, ...]

    def mutated(self, text: str) -> str:
        """The file's text with the mutation. Raises MutationError if `source` does not occur exactly once."""
        count = text.count(self.source)
        if count != 1:
            raise MutationError(f"{self.name}: expected {self.source!r} once in {self.file}, got it {count} times")
        return text.replace(self.source, self.mutant)

    def check(self, root: Path = ROOT) -> None:
        """Raises MutationError if the source text or a test is not there."""
        path = root / self.file
        if not path.is_file():
            raise MutationError(f"{self.name}: expected the file {self.file}, got none")
        self.mutated(path.read_text("utf-8"))

        for test in self.tests:
            file, _, function = test.partition("::")
            if not (root / file).is_file() or f"def {function}(" not in (root / file).read_text("utf-8"):
                raise MutationError(f"{self.name}: expected the test {test}, got none")


MUTATIONS = (
    Mutation(
        "a file of an adapter has one kind of keys",
        "dfusion/adapter.py",
        '    return by_peft if any(".lora_A." in key for key in converted) else converted',
        "    return converted",
        ("tests/unit/dfusion/test_export.py::test_layers_outside_attention_are_exported_for_stock_diffusers",),
    ),
    Mutation(
        "a stock pipeline's scheduler is one that DDIM can replace",
        "dfusion/models.py",
        "        require_ddim(dict(scheduler.config), (type(scheduler).__name__,))",
        "        pass",
        ("tests/unit/dfusion/test_models.py::test_a_stock_pipeline_whose_scheduler_ddim_cannot_replace_is_refused",),
    ),
    Mutation(
        "weights that a file lacks are not random",
        "dfusion/models.py",
        "        if report[problem]:",
        "        if False:",
        ("tests/unit/dfusion/test_model_folders.py::test_weights_that_a_file_lacks_are_not_random",),
    ),
    Mutation(
        "a model that cannot run is refused at submission",
        "service/jobs/checking.py",
        "if facts is not None and facts.problem is not None:",
        "if False:",
        ("tests/integration/jobs/test_model_cases.py::test_refused_at_submission",),
    ),
    Mutation(
        "a distilled or flow-matching scheduler is not read as DDIM",
        "dfusion/noise_schedules.py",
        "        _require_known_class(name)",
        "        pass",
        ("tests/unit/dfusion/test_model_folders.py::test_a_scheduler_of_another_kind_is_refused",),
    ),
    Mutation(
        "zero-terminal-SNR betas with epsilon prediction are refused",
        "dfusion/noise_schedules.py",
        '    if zero_snr and prediction_type == "epsilon":',
        "    if False:",
        ("tests/unit/dfusion/test_model_folders.py::test_zero_snr_with_epsilon_is_refused",),
    ),
    Mutation(
        "previews do not prevent the deletion of their samples",
        "service/db/queries/deletion.py",
        "JobSource.source_id == job_id, Job.kind.not_in(CACHE_KINDS), is_kept(Job)",
        "JobSource.source_id == job_id, is_kept(Job)",
        ("tests/integration/jobs/test_previews.py::test_previews_go_with_their_samples",),
    ),
    Mutation(
        "previews are made once",
        "service/service.py",
        "    return job_with_previews(session, request.spec) if isinstance(request.spec, PreviewJobSpec) else None\n",
        "    return None\n",
        ("tests/integration/jobs/test_previews.py::test_previews_are_made_once",),
    ),
    Mutation(
        "masks are those of the pair",
        "service/jobs/previews.py",
        "if masks is None or row.mask_settings == masks",
        "if True",
        ("tests/unit/api/pages/test_pair_tools.py::test_masks_of_other_thresholds_are_not_those_of_the_pair",),
    ),
    Mutation(
        "a session's change repeats the token of its page",
        "api/access.py",
        "        return _csrf_error(request)\n",
        "        return None\n",
        ("tests/unit/api/pages/test_security.py::test_a_change_needs_the_token_of_the_page",),
    ),
    Mutation(
        "a form repeats the token of its page",
        "api/pages/form_body.py",
        "    if token is not None and not",
        "    if token is None and not",
        (
            "tests/unit/api/pages/test_new_run.py::test_the_form_needs_the_scope_and_the_token",
            "tests/unit/api/pages/test_security.py::test_signing_out_ends_the_session_in_the_service",
        ),
    ),
    Mutation(
        "a form that is sent twice starts one run",
        "api/pages/routes/new_run.py",
        "create_job(service, spec, key, caller.key_id)",
        "create_job(service, spec, None, caller.key_id)",
        ("tests/unit/api/pages/test_new_run.py::test_the_form_starts_a_run_once",),
    ),
    Mutation(
        "a page of another site changes nothing",
        "api/access.py",
        "        if _is_cross_site(request):\n",
        "        if False:\n",
        ("tests/unit/api/pages/test_security.py::test_changes_from_other_sites_are_refused",),
    ),
    Mutation(
        "a session ends with its API key",
        "service/db/queries/browser_sessions.py",
        "BrowserSession.expires_at > now_seconds(), IS_ACTIVE)",
        "BrowserSession.expires_at > now_seconds())",
        ("tests/unit/api/pages/test_security.py::test_a_session_ends_with_its_key",),
    ),
    Mutation(
        "pages escape what users have written",
        "api/pages/render.py",
        "    autoescape=True,\n",
        "    autoescape=False,\n",
        ("tests/unit/api/pages/test_security.py::test_stored_scripts_stay_text_on_every_page",),
    ),
    Mutation(
        "a reviewer's later verdict is not overwritten by an earlier page",
        "service/service.py",
        "    if not own <= revision <= pair.revision:\n",
        "    if not revision <= pair.revision:\n",
        ("tests/unit/api/routes/test_verdicts.py::test_only_own_changes_conflict",),
    ),
    Mutation(
        "only administrators filter by gold pairs",
        "api/routes/results.py",
        "    if filters.gold is not None and KeyScope.ADMIN not in caller.scopes:\n",
        "    if False:\n",
        ("tests/unit/api/test_access.py::test_only_administrators_know_gold_pairs",),
    ),
    Mutation(
        "verdicts and scores are removed with their pairs and samples",
        "service/db/queries/deletion.py",
        "    _execute(session, delete(reference.table).where(is_any_of(reference, ids)))\n",
        "",
        ("tests/integration/test_deletion.py::test_a_deleted_job_is_removed_with_all_that_it_made",),
    ),
    Mutation(
        "programs that accept anything get JSON",
        "api/pages/negotiation.py",
        "        if match is not Match.FULL or not prefers_html(scope):\n",
        "        if match is not Match.FULL:\n",
        ("tests/unit/api/pages/test_negotiation.py::test_browsers_get_a_page_and_programs_the_same_json",),
    ),
    Mutation(
        "a webhook connects to public addresses alone",
        "service/outgoing.py",
        "            require_allowed(ip_address(address), self._allow_loopback)\n",
        "            ip_address(address)\n",
        ("tests/unit/service/test_outgoing.py::test_the_address_that_is_connected_to_is_the_one_that_was_checked",),
    ),
    Mutation(
        "an outcome of a delivery that comes too late changes nothing",
        "service/db/queries/webhooks.py",
        "WebhookDelivery.attempts == delivery.attempts, _IS_PENDING",
        "WebhookDelivery.attempts >= delivery.attempts",
        ("tests/unit/api/routes/test_webhooks.py::test_a_delivery_whose_sender_died_is_sent_again",),
    ),
    Mutation(
        "a page reads a limited number of rows",
        "service/db/queries/pages.py",
        "        if row is not None:\n",
        "        if False:\n",
        ("tests/integration/test_filters.py::test_a_page_reads_a_limited_number_of_rows",),
    ),
    Mutation(
        "a page of several prompts ends where the search for one of them ended",
        "service/db/queries/pages.py",
        "if not ends or getattr(row, key.key) <= min(ends)",
        "if True",
        ("tests/integration/test_filters.py::test_filters_select_the_rows_of_a_search_through_all",),
    ),
    Mutation(
        "workers do not migrate",
        "service/service.py",
        "        if migrates:\n",
        "        if True:\n",
        ("tests/integration/test_migrations.py::test_workers_and_sweepers_do_not_migrate",),
    ),
    Mutation(
        "each process of the API counts in its own files",
        "api/server.py",
        "    app.state.metrics.process = number\n",
        "    app.state.metrics.process = 0 * number\n",
        ("tests/integration/test_processes.py::test_each_process_shows_the_requests_of_all",),
    ),
    Mutation(
        "the processes of the API share its connections",
        "api/main.py",
        "API_POOL.divided_by(settings.api_processes)",
        "API_POOL",
        ("tests/integration/test_pooler.py::test_the_processes_of_the_api_share_its_connections",),
    ),
    Mutation(
        "a worker writes only under the epoch of its lease",
        "service/db/queries/stages.py",
        "return Stage.id == stage_id, Stage.lease_epoch == epoch, Stage.state == StageState.RUNNING",
        "return Stage.id == stage_id, Stage.lease_epoch >= epoch, Stage.state == StageState.RUNNING",
        ("tests/integration/test_execution.py::test_nothing_is_written_under_an_old_epoch",),
    ),
    Mutation(
        "a round that can end the run is evaluated before the next one",
        "service/jobs/kinds/rounds.py",
        "return last_stage_kind(spec, round_number) if spec.stop_when else StageKind.TRAIN",
        "return StageKind.TRAIN",
        ("tests/integration/test_watching.py::test_a_round_that_can_end_the_run_is_evaluated_before_the_next_one",),
    ),
    Mutation(
        "a warning waits for the evaluations of earlier rounds",
        "service/jobs/watching.py",
        "if round_number == 0 or pending < round_number:",
        "if round_number == 0:",
        ("tests/integration/test_watching.py::test_a_round_waits_for_earlier_evaluations_with_its_warning",),
    ),
    Mutation(
        "the last evaluation of a stopped run does not repeat the warning",
        "service/jobs/watching.py",
        "if newest is None or job.stopped is not None:",
        "if newest is None:",
        ("tests/integration/test_watching.py::test_a_run_stops_at_a_sign_as_if_it_had_only_the_rounds_before",),
    ),
    Mutation(
        "of equal rounds the earliest is the best",
        "dfusion/rewards/signs.py",
        "key=lambda row: (row.mean, -row.round)",
        "key=lambda row: (row.mean, row.round)",
        ("tests/unit/dfusion/rewards/test_signs.py::test_of_equal_rounds_the_earliest_is_the_best",),
    ),
    Mutation(
        "prompts without quoted text are refused if a scorer reads text",
        "service/jobs/checking.py",
        'if not quotes_text(prompt["text"]):',
        "if False:",
        ("tests/unit/service/jobs/test_checking.py::test_a_scorer_that_reads_text_needs_prompts_that_quote_one",),
    ),
    Mutation(
        "a label that prefers both images is refused",
        "dfusion/labelled_pairs.py",
        "if labels not in ((1, 0), (0, 1), (TIE, TIE)):",
        "if labels[0] not in (0, 1, TIE):",
        ("tests/unit/dfusion/test_labelled_pairs.py::test_a_bad_row_is_named",),
    ),
    Mutation(
        "a stage has one output in a slot",
        "migrations/versions/0001_tables.py",
        '    sa.UniqueConstraint("stage_id", "slot"),\n',
        "",
        (
            "tests/integration/test_execution.py::test_a_stage_has_one_output_in_a_slot",
            "tests/integration/test_migrations.py::test_migrations_make_the_tables_that_the_code_knows",
        ),
    ),
    Mutation(
        "the bytes of an artifact are those that were stored",
        "service/storage/files.py",
        "        if actual != sha256:\n",
        "        if not actual:\n",
        ("tests/integration/test_storage.py::test_corrupt_bytes_are_detected_and_repaired_by_storing_them_again",),
    ),
    Mutation(
        "an object of S3 is read back before its key is returned",
        "service/storage/s3.py",
        "            actual = _sha256(self._chunks(key, 0, None))\n        if",
        "            actual = sha256\n        if",
        ("tests/integration/test_storage.py::test_an_object_is_read_back_before_its_key_is_returned",),
    ),
    Mutation(
        "a file gets its name when it is complete",
        "service/storage/files.py",
        "part.replace(target)",
        "shutil.copyfile(part, target)",
        ("tests/integration/test_storage.py::test_a_file_is_replaced_whole",),
    ),
    Mutation(
        "the sweeper requeues stages of lost workers",
        "service/maintenance.py",
        "lost = execution.sweep(service.uow, service.settings)",
        "lost = 0",
        ("tests/integration/test_hints.py::test_the_sweeper_frees_what_a_silent_worker_held",),
    ),
    Mutation(
        "a commit whose reply was lost is not repeated",
        "service/db/unit_of_work.py",
        "                if sent and _is_outcome_unknown(error):",
        "                if sent and not _is_outcome_unknown(error):",
        (
            "tests/integration/test_unit_of_work.py::test_a_lost_reply_to_a_commit_doubles_and_loses_nothing",
            "tests/integration/test_execution_on_postgres.py::test_lost_replies_claim_once_and_finish_once",
        ),
    ),
    Mutation(
        "an Idempotency-Key stands for one request",
        "service/service.py",
        " and earlier.fingerprint != request.fingerprint:\n",
        " and not earlier.fingerprint:\n",
        ("tests/unit/api/test_rounds.py::test_repeating_a_request_with_its_key_returns_the_same_job",),
    ),
    Mutation(
        "masks of items are merged by exclusive or",
        "dfusion/attention/masks.py",
        'counts % 2 == 1 if merge == "xor" else counts > 0',
        'counts > 0 if merge == "xor" else counts > 0',
        ("tests/unit/dfusion/attention/test_masks.py::test_two_items",),
    ),
    Mutation(
        "masks are resized to the nearest pixel",
        "dfusion/attention/masks.py",
        'mode="nearest"',
        'mode="bilinear"',
        ("tests/unit/dfusion/attention/test_masks.py::test_resize_takes_the_nearest_pixel",),
    ),
    Mutation(
        "the ratio of the preferred side is clipped",
        "dfusion/losses/dpo.py",
        "log_ratio_w = log_ratio_w.clamp(lowest, highest)",
        "log_ratio_w = log_ratio_w.clamp(2 * lowest, 2 * highest)",
        ("tests/unit/dfusion/losses/test_dpo.py::test_each_sides_ratio_is_clipped_by_itself",),
    ),
    Mutation(
        "the unconditional half comes first",
        "dfusion/guidance.py",
        "Conditioning.cat([Conditioning.of(negative_prompt_embeds), conditioning])",
        "Conditioning.cat([conditioning, Conditioning.of(negative_prompt_embeds)])",
        ("tests/unit/dfusion/test_guidance.py::test_sdxl_guidance_by_two_separate_calls",),
    ),
    Mutation(
        "a sample's noise comes from its own seed",
        "dfusion/sampling.py",
        "torch.randn(shape, generator=generator) for generator in generators",
        "torch.randn(shape, generator=generators[0]) for _ in generators",
        ("tests/unit/dfusion/test_sampling.py::test_a_sample_depends_on_its_seed_only",),
    ),
    Mutation(
        "a route asks for its scope",
        "api/routes/jobs.py",
        '"/{job_id}/cancel",\n    status_code=status.HTTP_202_ACCEPTED,\n    dependencies=[require_scope("submit")],',
        '"/{job_id}/cancel",\n    status_code=status.HTTP_202_ACCEPTED,',
        ("tests/unit/api/test_access.py::test_keys_are_limited_to_their_scopes",),
    ),
    Mutation(
        "the images of a preference test are in random order",
        "service/preference_tests.py",
        "sorted(question.samples, key=lambda sample: _rank(question.test_id, question.number, rater, sample))",
        "list(question.samples)",
        ("tests/unit/api/routes/test_preference_tests.py::test_the_order_is_blind_stable_and_balanced",),
    ),
    Mutation(
        "an evaluation with a preference test is not deleted",
        "service/db/queries/deletion.py",
        "select(PreferenceTest.id).where(PreferenceTest.job_id == job_id)",
        "select(PreferenceTest.id).where(PreferenceTest.job_id == '')",
        ("tests/integration/test_preference_tests.py::test_an_evaluation_with_a_test_is_neither_deleted_nor_expires",),
    ),
    Mutation(
        "a cell of a CSV file is no formula",
        "api/csv_text.py",
        "isinstance(value, str) and value.startswith(_FORMULA)",
        "False",
        ("tests/unit/api/routes/test_preference_tests.py::test_no_cell_is_a_formula",),
    ),
    Mutation(
        "a training uses the negative prompt of its samples",
        "dfusion/transitions.py",
        "[sampling.negative_prompt]",
        '[""]',
        ("tests/unit/dfusion/test_guidance.py::test_training_uses_the_negative_prompt_of_the_samples",),
    ),
    Mutation(
        "embeddings of another negative prompt are refused",
        "dfusion/guidance.py",
        "set(texts) != {config.negative_prompt}",
        "not texts",
        ("tests/unit/dfusion/test_guidance.py::test_embeddings_of_another_negative_prompt_are_rejected",),
    ),
    Mutation(
        "a prompt that loads an adapter is refused",
        "dfusion/prompts/__init__.py",
        "    if adapter is not None:\n",
        "    if adapter == '':\n",
        ("tests/unit/dfusion/prompts/test_text.py::test_tags_that_load_files_are_refused",),
    ),
    Mutation(
        "items are not searched in prompts of other languages",
        "dfusion/prompts/items.py",
        "    if not is_english(text):\n",
        "    if is_english(text) is None:\n",
        ("tests/unit/dfusion/prompts/test_text.py::test_items_of_other_languages_must_be_marked",),
    ),
    Mutation(
        "an adapter of a text encoder alone is refused",
        "dfusion/adapter_files.py",
        "    if not layers:\n",
        "    if layers is None:\n",
        ("tests/unit/dfusion/test_adapter_files.py::test_other_files_are_refused_by_name",),
    ),
    Mutation(
        "an adapter of another text encoder is refused",
        "dfusion/adapter_files.py",
        "            if encoder not in encoders:\n",
        '            if encoder == "":\n',
        ("tests/unit/dfusion/test_adapter_files.py::test_other_files_are_refused_by_name",),
    ),
    Mutation(
        "the text encoder of a detached adapter is restored",
        "dfusion/text_encoder_lora.py",
        "            weight.data.copy_(original)\n",
        "            pass\n",
        (
            "tests/unit/dfusion/test_text_encoder_lora.py"
            "::test_prompts_are_encoded_with_the_merged_weights_until_the_adapter_is_detached",
        ),
    ),
    Mutation(
        "a file with a text encoder is refused without one",
        "dfusion/adapter.py",
        "    if text_encoders is None:\n",
        "    if text_encoders is None and not layout.text_encoders:\n",
        ("tests/unit/dfusion/test_text_encoder_lora.py::test_text_encoders_must_be_given",),
    ),
    Mutation(
        "an adapter with NaN is refused",
        "dfusion/adapter_files.py",
        "            if not _is_finite(content[tensor.start : tensor.stop], tensor.dtype):\n",
        "            if key == '':\n",
        ("tests/unit/dfusion/test_adapter_files.py::test_other_files_are_refused_by_name",),
    ),
    Mutation(
        "an adapter that cannot be loaded is refused at submission",
        "service/jobs/checking.py",
        "elif problem := self._catalogue.adapter_problem(base.name):",
        "elif problem := None:",
        (
            "tests/integration/jobs/test_adapters.py"
            "::test_models_whose_adapter_cannot_be_loaded_are_refused_at_submission",
        ),
    ),
    Mutation(
        "a resumed training has the average of its updates",
        "dfusion/training.py",
        "                self._average[name] = average[name].to(parameter.device)\n",
        "                pass\n",
        ("tests/unit/dfusion/test_training_settings.py::test_a_training_resumes_exactly",),
    ),
    Mutation(
        "carried moments have their own learning rates",
        "dfusion/training.py",
        "            self._updates_before = optimizer.updates\n",
        "            pass\n",
        ("tests/unit/dfusion/test_training_settings.py::test_a_training_resumes_exactly",),
    ),
)


@contextmanager
def copied(tree: Path) -> Iterator[Path]:
    """Copy the tree to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        yield Path(shutil.copytree(tree, Path(folder) / "tree", ignore=LEFT_OUT))


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy. Returns pytest's exit code and output."""
    options = ["-p", "no:cacheprovider", "--tb=line", "-rfE"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def require_passing(tree: Path, mutations: Sequence[Mutation]) -> None:
    """Raises MutationError unless the tests of all mutations pass in the unchanged tree."""
    code, output = run_tests(tree, sorted({test for mutation in mutations for test in mutation.tests}))
    if code != PASSED:
        raise MutationError(f"expected the tests to pass without a mutation, got\n{output}")


def survivors(tree: Path, mutation: Mutation) -> list[str]:
    """Return the tests that pass without the guard. Raises MutationError if they could not be run."""
    with copied(tree) as copy:
        path = copy / mutation.file
        path.write_text(mutation.mutated(path.read_text("utf-8")), "utf-8")
        code, output = run_tests(copy, mutation.tests)
    if code not in (PASSED, FAILED):
        raise MutationError(f"{mutation.name}: the tests could not be run\n{output}")
    failed = set(re.findall(r"^(?:FAILED|ERROR) (\S+?::\w+)", output, re.MULTILINE))
    return [test for test in mutation.tests if test not in failed]


def main(arguments: Sequence[str] | None = None) -> int:
    """Apply the mutations whose names contain one of the words. Returns 1 if one survives, 2 on errors."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Run mutation tests.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutations whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel mutations (2)")
    options = parser.parse_args(arguments)
    words = options.words or [""]
    chosen = [mutation for mutation in MUTATIONS if any(word in mutation.name for word in words)]

    # one copy for all mutations, so that edits in the meantime have no effect
    try:
        with copied(ROOT) as tree:
            verdicts = try_all(tree, chosen, options.jobs)
    except MutationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{sum(verdicts)} of {len(chosen)} mutations were killed\n")
    return 0 if all(verdicts) else 1


def try_all(tree: Path, mutations: Sequence[Mutation], jobs: int) -> list[bool]:
    """Apply and report each mutation. Returns whether each is killed. Raises MutationError if one cannot be applied."""
    # 1. the table matches the source, and its tests pass without mutations
    for mutation in mutations:
        mutation.check(tree)
    require_passing(tree, mutations)

    # 2. each mutation by itself
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda mutation: survivors(tree, mutation), mutations)
        return [_report(mutation, passed) for mutation, passed in zip(mutations, results, strict=True)]


def _report(mutation: Mutation, passed: Sequence[str]) -> bool:
    """Report a mutation. Returns whether it was killed."""
    sys.stdout.write(f"{'survived' if passed else 'killed  '}  {mutation.file}: {mutation.name}\n")
    for test in passed:
        sys.stdout.write(f"          still passes: {test}\n")
    sys.stdout.flush()
    return not passed


if __name__ == "__main__":
    sys.exit(main())
