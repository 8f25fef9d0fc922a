"""How an engine is run, on a fake TensorRT that notes what the real one would answer with a crash or with noise."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import fake_gpu
import numpy as np
import pytest
from engine_cases import one_sentence

from companion import CompanionError
from companion.engines import Metadata, TensorInfo
from companion.engines.tensorrt import TensorRTEngine, library


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_answers_are_computed(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine:
        assert engine.inputs == (TensorInfo("x", "float32", (None, 3)),)
        assert engine.outputs == (TensorInfo("y", "float32", (None, 3)),)
        for batch in (4, 1, 16, 2):  # memory grows, and what is left in it from before does not show
            x = numbers(batch, 3, seed=batch)
            np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x + 1)
    assert gpu.contexts == 1


def test_more_samples_than_the_profile_has_are_run_in_parts(fake, gpu, engine_file):
    fake()
    tensors = [["a", "INPUT", "FLOAT", [-1, 3]], ["b", "INPUT", "FLOAT", [2]]]
    tensors += [["c", "OUTPUT", "FLOAT", [-1, 3]], ["d", "OUTPUT", "FLOAT", [2]]]
    with TensorRTEngine(engine_file(), threads=1) as engine:
        x = numbers(40, 3)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x + 1)
        assert gpu.executed == [14, 13, 13]
    profile = {"a": [[1, 3], [4, 3], [16, 3]], "b": [[2]] * 3}
    with TensorRTEngine(engine_file(fake_gpu.plan(tensors, [profile])), threads=1) as engine:
        # One output is of the whole batch, which parts would not give.
        with pytest.raises(CompanionError, match=r"'a' has the shape \[17, 3\]") as error:
            engine.run({"a": numbers(17, 3), "b": numbers(2)})
        one_sentence(error)


def test_memory_is_kept_between_runs_and_only_grows(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine:
        for batch in (4, 4, 2, 4):
            engine.run({"x": numbers(batch, 3)})
        assert gpu.allocated == 2
        engine.run({"x": numbers(5, 3)})
        assert gpu.allocated == 4
        assert len(gpu.blocks) == 2


def test_answers_are_the_callers_own(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine:
        first = engine.run({"x": numbers(2, 3)})["y"]
        kept = first.copy()
        engine.run({"x": 1 - numbers(2, 3)})
        np.testing.assert_array_equal(first, kept)
        first[:] = 0
    assert first.base is None or isinstance(first.base, np.ndarray)


def test_several_tensors_of_several_types(fake, gpu, engine_file):
    fake()
    types = {"a": ("HALF", np.float16), "b": ("INT64", np.int64), "c": ("BOOL", np.bool_)}
    tensors = [[name, "INPUT", dtype, [-1, 2]] for name, (dtype, _) in types.items()]
    tensors += [[f"{name}_out", "OUTPUT", dtype, [-1, 2]] for name, (dtype, _) in types.items()]
    profile = {name: [[1, 2], [2, 2], [4, 2]] for name in types}
    inputs = {name: np.array([[0, 1], [1, 0]], dtype) for name, (_, dtype) in types.items()}
    with TensorRTEngine(engine_file(fake_gpu.plan(tensors, [profile])), threads=1) as engine:
        found = engine.run(inputs)
    assert [found[f"{name}_out"].dtype for name in types] == [dtype for _, dtype in types.values()]
    np.testing.assert_array_equal(found["a_out"], [[1, 3], [3, 1]])
    np.testing.assert_array_equal(found["b_out"], [[1, 3], [3, 1]])
    np.testing.assert_array_equal(found["c_out"], [[True, False], [False, True]])


def test_scalars(fake, gpu, engine_file):
    fake()
    tensors = [["x", "INPUT", "FLOAT", []], ["y", "OUTPUT", "FLOAT", []]]
    with TensorRTEngine(engine_file(fake_gpu.plan(tensors, [{"x": [[], [], []]}])), threads=1) as engine:
        assert engine.run({"x": np.array(3, np.float32)})["y"] == 7


def test_each_thread_has_a_context_while_it_computes(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine, ThreadPoolExecutor(8) as pool:

        def work(seed):
            x = numbers(1 + seed % 16, 3, seed=seed)
            return np.array_equal(engine.run({"x": x})["y"], 2 * x + 1)

        assert all(pool.map(work, range(200)))
        assert 1 < gpu.contexts <= 8


def test_threads_that_come_and_go_share_one_context(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine:
        for _ in range(20):
            thread = threading.Thread(target=engine.run, args=({"x": numbers(1, 3)},))
            thread.start()
            thread.join()
    assert gpu.contexts == 1


def test_close_waits_for_what_runs(fake, gpu, engine_file, monkeypatch):
    fake()
    begun, go_on = threading.Event(), threading.Event()
    synchronize = fake_gpu.NumpyMemory.synchronize

    def slow(self):
        begun.set()
        go_on.wait(10)
        synchronize(self)

    engine = TensorRTEngine(engine_file(), threads=1)
    engine.run({"x": numbers(1, 3)})
    monkeypatch.setattr(fake_gpu.NumpyMemory, "synchronize", slow)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(engine.run, {"x": numbers(2, 3)})
        assert begun.wait(10)
        closing = pool.submit(engine.close)
        time.sleep(0.05)
        assert not closing.done()
        go_on.set()
        np.testing.assert_array_equal(running.result()["y"], 2 * numbers(2, 3) + 1)
        closing.result()
    with pytest.raises(CompanionError, match="is closed"):
        engine.run({"x": numbers(1, 3)})
    engine.close()


def test_everything_goes_in_order_even_if_it_never_ran(fake, gpu, engine_file):
    fake()
    TensorRTEngine(engine_file(), threads=1).close()
    engine = TensorRTEngine(engine_file(), threads=1)
    engine.run({"x": numbers(1, 3)})
    engine.close()
    del engine
    gc.collect()


def test_profiles(fake, gpu, engine_file):
    fake()
    small, large = {"x": [[1, 3], [1, 3], [2, 3]]}, {"x": [[8, 3], [16, 3], [32, 3]]}
    path = engine_file(fake_gpu.plan(profiles=[small, large]))
    with TensorRTEngine(path, threads=1, profile=1) as engine:
        assert engine.run({"x": numbers(20, 3)})["y"].shape == (20, 3)
        np.testing.assert_array_equal(engine.run({"x": numbers(33, 3)})["y"], 2 * numbers(33, 3) + 1)  # 17 and 16
        with pytest.raises(
            CompanionError, match=r"'x' has the shape \[2, 3\], .* takes \[8, 3\] to \[32, 3\]"
        ) as error:
            engine.run({"x": numbers(2, 3)})
        one_sentence(error)
    for profile in (2, -1):
        with pytest.raises(CompanionError, match="has 2, from 0") as error:
            TensorRTEngine(path, threads=1, profile=profile)
        one_sentence(error)


def test_the_description_comes_with_the_file(fake, gpu, engine_file):
    fake()
    said = Metadata(task="classify", labels=("一", "two", "three"), input_size=(3,))
    with TensorRTEngine(engine_file(description=said.to_text()), threads=1) as engine:
        assert engine.metadata == said
        assert engine.name == "tensorrt"


def test_what_the_engine_runs_is_told(fake, gpu, engine_file):
    fake()
    with TensorRTEngine(engine_file(), threads=1) as engine:
        assert json.loads(engine.kernels()) == {"Layers": ["a", "b"], "form": "json"}


def refused(*arguments, **options):
    with pytest.raises(CompanionError) as error:
        TensorRTEngine(*arguments, threads=1, **options)
    return one_sentence(error)


def test_no_gpu(fake, engine_file, monkeypatch):
    fake()
    monkeypatch.setattr(library, "gpu", lambda: None)
    assert "there is none here" in refused(engine_file())


def test_an_engine_for_another_gpu(fake, engine_file):
    fake(refuses="the engine was built for another compute capability")
    text = refused(path := engine_file())
    assert f"{path} on Fake 9000 (compute capability 9.0" in text
    assert "unsupported cc" in text
    assert "built for another GPU" in text


def test_an_engine_that_the_library_refuses_without_a_check_before(fake, engine_file):
    fake(refuses="magicTag is wrong", has_validity=False)
    assert "magicTag is wrong" in refused(engine_file())


@pytest.mark.parametrize("change", [{"version": "0.9"}, {"library": "tensorrt_rtx"}])
def test_an_engine_of_another_library_or_version(fake, engine_file, change):
    fake()
    assert f"and here is tensorrt {fake_gpu.VERSION}: build it again" in refused(engine_file(**change))


def test_options_of_the_build_for_an_engine_that_is_built(fake, engine_file):
    fake()
    assert "leave out batch, precision" in refused(engine_file(), precision="fp16", batch=(1, 1, 1))


def test_a_type_that_numpy_lacks(fake, engine_file):
    fake()
    tensors = [["x", "INPUT", "BF16", [-1]], ["y", "OUTPUT", "FLOAT", [-1]]]
    assert "x is BF16" in refused(engine_file(fake_gpu.plan(tensors, [{"x": [[1], [1], [1]]}])))


def test_sizes_that_depend_on_values(fake, gpu, engine_file):
    fake()
    tensors = [["x", "INPUT", "FLOAT", [-1, 3]], ["y", "OUTPUT", "FLOAT", [-2, 3]]]
    with TensorRTEngine(engine_file(fake_gpu.plan(tensors)), threads=1) as engine:
        with pytest.raises(CompanionError, match="the size of its output 'y' depends on the values") as error:
            engine.run({"x": numbers(2, 3)})
        one_sentence(error)


def test_a_run_that_fails_says_why_and_leaves_nothing_behind(fake, gpu, engine_file):
    fake(executes=False)
    with TensorRTEngine(engine_file(), threads=1) as engine:
        for _ in range(2):
            with pytest.raises(CompanionError, match="TensorRT cannot run: out of memory") as error:
                engine.run({"x": numbers(2, 3)})
            one_sentence(error)


def test_no_context(fake, gpu, engine_file):
    fake(contexts=False)
    with TensorRTEngine(engine_file(), threads=1) as engine:
        with pytest.raises(CompanionError, match="makes no execution context") as error:
            engine.run({"x": numbers(2, 3)})
        one_sentence(error)
