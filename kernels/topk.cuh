// Experts of a token.
#pragma once

constexpr int kNumTopk = QCOMM_NUM_TOPK;
