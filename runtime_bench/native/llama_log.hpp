// llama.cpp's log: what it last complained about, and what it tells nowhere else of how it computes.
#pragma once

#include <cmath>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>

#include "llama.h"
#include "machine.hpp"

namespace runner {

// The last warnings and errors that llama.cpp logged, for the reason of a failure; and what it tells nowhere else: whether
// it chose its flash kernel, and which buffers hold the weights.
class Log {
  public:
    void add(ggml_log_level level, const char * text) {
        const std::lock_guard<std::mutex> hold(lock_);
        level_ = level == GGML_LOG_LEVEL_CONT ? level_ : level;
        if (level_ != GGML_LOG_LEVEL_INFO && level_ != GGML_LOG_LEVEL_WARN && level_ != GGML_LOG_LEVEL_ERROR) {
            return;
        }
        for (const char * letter = text; *letter; ++letter) {
            if (*letter == '\n') {
                end_line();
            } else {
                open_ += *letter;
            }
        }
    }
    json flash_attention() {
        const std::lock_guard<std::mutex> hold(lock_);
        return flash_;
    }
    json weight_buffers() {
        const std::lock_guard<std::mutex> hold(lock_);
        return buffers_;
    }
    std::string last(size_t count = 3) {
        const std::lock_guard<std::mutex> hold(lock_);
        std::string text;
        for (size_t i = lines_.size() > count ? lines_.size() - count : 0; i < lines_.size(); ++i) {
            text += (text.empty() ? "" : "; ") + lines_[i];
        }
        return text.empty() ? "llama.cpp gave no reason" : text;
    }

  private:
    void end_line() {
        const std::string mark = " model buffer size = ";
        const auto size = open_.find(mark);
        if (size != std::string::npos) {
            const auto name = open_.substr(open_.rfind(' ', size - 1) + 1, size - open_.rfind(' ', size - 1) - 1);
            const auto bytes = std::llround(std::strtod(open_.c_str() + size + mark.size(), nullptr) * (1 << 20));
            buffers_[name] = buffers_.value(name, 0LL) + bytes;
        }
        if (open_.find("Flash Attention enabled") != std::string::npos) {
            flash_ = true;
        } else if (open_.find("Flash Attention not supported") != std::string::npos) {
            flash_ = false;
        }
        if (level_ == GGML_LOG_LEVEL_INFO) {
            open_.clear();
            return;
        }
        const auto first = open_.find_first_not_of(" \t");
        if (first != std::string::npos) {
            lines_.push_back(open_.substr(first, open_.find_last_not_of(" \t") + 1 - first));
        }
        if (lines_.size() > 20) {
            lines_.pop_front();
        }
        open_.clear();
    }
    std::deque<std::string> lines_;
    std::string open_;
    ggml_log_level level_ = GGML_LOG_LEVEL_NONE;
    json flash_;
    json buffers_ = json::object();
    std::mutex lock_;
};

inline Log llama_log;

}  // namespace runner
