"""The evidence before and after, on pages as the project writes them."""

from calibration.evidence.changes import Score, page_scores

PAGE = """# Accuracy

## Shipped fits

| GPU | operator | format | unseen | vllm | sglang |
| --- | --- | --- | --- | ---: | ---: |
| a100 | gemm | bf16 | (n, k) of GEMMs | 5.0 (6,473) | |

## a100

| method | rows | MAPE | median | coverage | width |
| --- | ---: | ---: | ---: | ---: | ---: |
| prunesim | 400 | 6.86 | 4.74 | **80.3** | 15.0 |
| prunesim | all | 5.22 | 3.51 | 90.8 | 12.3 |

## Servers

| rows | cases | tokens/s: error | tokens/s: inside | first token: error | first token: inside |
| --- | ---: | ---: | ---: | ---: | ---: |
| vllm | 38 | 10.8 % | 68.4 % | 14.1 % | 76.3 % |

## Single rows

| engine | measured | predicted | error |
| --- | ---: | ---: | ---: |
| vllm | 1.0 s | 1.1 s | +10 % |
"""


def test_every_set_of_a_page_has_its_scores_and_single_rows_have_none() -> None:
    assert page_scores(PAGE) == {
        "Shipped fits: a100 gemm bf16 (n, k) of GEMMs, vllm": Score(5.0),
        "a100: prunesim 400": Score(6.86, "80.3", "15.0"),
        "a100: prunesim all": Score(5.22, "90.8", "12.3"),
        "Servers: vllm, tokens/s": Score(10.8, "68.4 %"),
        "Servers: vllm, first token": Score(14.1, "76.3 %"),
    }
