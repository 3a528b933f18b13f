"""A pool under a real Ray that grows with its load, with two ingresses, API keys, and two ranks in each replica."""

import threading
import time
from pathlib import Path

import openai
import pytest

from support.ray_pool import running_pool

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray warns of its own libraries

KEY, OTHER = "a-key-of-the-tests", "another-key-of-the-tests"
QUESTION = [{"role": "user", "content": "What is written there? " * 20}]


def test_a_pool_grows_with_its_load_and_is_whole_again_after_a_replica_with_its_ranks_has_ended(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n{OTHER}\n")
    with running_pool(
        key=KEY,
        num_replicas=1,
        max_replicas=2,
        target_ongoing_requests=1.0,
        upscale_delay_s=0,
        num_cpus=0.5,
        ingress_cpus=0.5,
        num_ingresses=2,
        tensor_parallel_size=2,
        api_keys_file=str(keys),
        device="cpu",
        dtype="float32",
        block_size=16,
        kv_cache_bytes=64 << 20,
    ) as pool:
        assert pool.http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert pool.http.get("/metrics", headers={"authorization": ""}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            pool.client(api_key="wrong").chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
        assert len(pool.actors()) == 1
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                pool.client().chat.completions.create(
                    model="tiny", messages=QUESTION, max_tokens=100, extra_body={"ignore_eos": True}
                )

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            until_s = time.monotonic() + 60
            while len(pool.actors()) < 2:
                assert time.monotonic() < until_s, "the pool has not grown"
                time.sleep(0.2)
            pool.wait_for_replicas(2)
        finally:
            done.set()
            for thread in threads:
                thread.join()

        def cached(key: str) -> int:
            reply = pool.client(api_key=key).chat.completions.create(model="tiny", messages=QUESTION, max_tokens=1)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens_details is not None
            return reply.usage.prompt_tokens_details.cached_tokens or 0

        cached(KEY)
        assert cached(KEY) > 0
        assert cached(OTHER) == 0, "keys share nothing"
        victim = next(iter(pool.actors()))
        pool.kill(victim)
        assert cached(KEY) >= 0, "the other replica answers"
        pool.wait_for_replicas(2, without=victim)
