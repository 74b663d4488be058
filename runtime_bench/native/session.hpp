// An open file: what computes it, its tokens, and its logits.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"
#include "llama_log.hpp"
#include "machine.hpp"
#include "python_random.hpp"

namespace runner {

using Tokens = std::vector<llama_token>;

// A type of keys and values alike, as exporters/gguf/quants.py has it: quantized values are read in the flash kernel
// alone, which rounds what float32 is there to keep.
struct CacheType {
    ggml_type type;
    llama_flash_attn_type flash;
};

inline const std::map<std::string, CacheType> kCacheTypes = {
    {"f32", {GGML_TYPE_F32, LLAMA_FLASH_ATTN_TYPE_DISABLED}},
    {"f16", {GGML_TYPE_F16, LLAMA_FLASH_ATTN_TYPE_AUTO}},
    {"q8_0", {GGML_TYPE_Q8_0, LLAMA_FLASH_ATTN_TYPE_ENABLED}},
    {"q4_0", {GGML_TYPE_Q4_0, LLAMA_FLASH_ATTN_TYPE_ENABLED}},
};

template <typename Table> const auto & row_of(const Table & table, const std::string & name, const char * what) {
    const auto found = table.find(name);
    if (found == table.end()) {
        throw Failure("the runner knows no " + std::string(what) + " " + name);
    }
    return found->second;
}

inline std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char letter) { return std::tolower(letter); });
    return text;
}

// What computes a whole model beside the processor: no accelerator of single operations, such as BLAS.
inline bool takes_layers(ggml_backend_dev_t device) {
    const auto type = ggml_backend_dev_type(device);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

// The devices that a name in small letters means: `gpu` all of them, a backend (vulkan, opencl, cuda, metal) its own, a
// device (vulkan1) itself. None for the processor, and where the backend is built in and finds no device.
inline std::vector<ggml_backend_dev_t> devices_of(const std::string & asked) {
    std::vector<ggml_backend_dev_t> devices;
    std::set<std::string> known = {"cpu"};
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        const auto backend = ggml_backend_reg_get(i);
        const auto name = lower(ggml_backend_reg_name(backend));
        if (name == "cpu" || name == "blas") {
            continue;
        }
        known.insert({"gpu", name});
        for (size_t j = 0; j < ggml_backend_reg_dev_count(backend); ++j) {
            const auto device = ggml_backend_reg_dev_get(backend, j);
            const auto own = lower(ggml_backend_dev_name(device));
            known.insert(own);
            if (takes_layers(device) && (asked == "gpu" || asked == name || asked == own)) {
                devices.push_back(device);
            }
        }
    }
    if (!known.count(asked)) {
        const auto names = std::accumulate(std::next(known.begin()), known.end(), *known.begin(),
                                           [](auto all, const auto & name) { return std::move(all) + ", " + name; });
        throw Failure("the runner was built without the backend " + asked + "; it has " + names);
    }
    return devices;
}

// One token of a batch, as exporters/gguf/runtime.py has it.
struct Entry {
    llama_token token;
    llama_pos position;
    std::vector<llama_seq_id> sequences;
    bool wanted;
};

// Settings are those of exporters/gguf/runtime.py: mapped weights, the processor alone unless something is asked for.
class Session {
  public:
    Session(const std::string & path, const json & settings) : path_(path) {
        auto params = llama_model_default_params();
        const auto backend = settings.find("backend");
        const bool any = backend != settings.end() && !backend->is_null();
        devices_ = devices_of(any ? lower(backend->get<std::string>()) : "cpu");
        params.n_gpu_layers = devices_.empty() ? 0 : -1;
        devices_.push_back(nullptr);  // without a list llama.cpp would take what it finds for large products
        params.devices = devices_.data();
        params.load_mode = LLAMA_LOAD_MODE_MMAP;
        model_.reset(llama_model_load_from_file(path.c_str(), params));
        if (!model_) {
            throw Failure("llama.cpp cannot load " + path + ": " + llama_log.last());
        }
        vocab_ = llama_model_get_vocab(model_.get());
        const auto n_ctx = settings.at("n_ctx").get<uint32_t>();
        n_ctx_ = n_ctx;
        auto context = llama_context_default_params();
        context.n_ctx = n_ctx;
        context.n_batch = std::min(settings.at("n_batch").get<uint32_t>(), n_ctx);
        context.n_ubatch = std::min(settings.at("n_ubatch").get<uint32_t>(), context.n_batch);
        context.n_threads = context.n_threads_batch = settings.at("n_threads").get<int32_t>();
        context.n_seq_max = settings.value("n_seq", uint32_t{1});
        context.kv_unified = context.n_seq_max > 1;  // sequences may have tokens in common
        const auto asked = settings.find("cache_type");
        cache_type_ = asked == settings.end() || asked->is_null() ? "f16" : asked->get<std::string>();
        const auto & cache = row_of(kCacheTypes, cache_type_, "type of a cache");
        context.type_k = context.type_v = cache.type;
        context.flash_attn_type = cache.flash;
        context.no_perf = true;
        context_.reset(llama_init_from_model(model_.get(), context));
        if (!context_) {
            throw Failure("llama.cpp cannot make a context of " + std::to_string(n_ctx) + " tokens for " + path + ": " +
                          llama_log.last());
        }
        const auto added = tokenize("");
        const auto bos = llama_vocab_bos(vocab_);
        begins_with_bos_ = !added.empty() && added[0] == bos;
    }

    json facts() const {
        char description[256] = "";
        llama_model_desc(model_.get(), description, sizeof description);
        std::string info = llama_print_system_info();
        while (!info.empty() && (info.back() == ' ' || info.back() == '|')) {
            info.pop_back();
        }
        for (const auto device : devices_) {
            info += device ? std::string(" | ") + ggml_backend_dev_name(device) + ": " +
                                 ggml_backend_dev_description(device)
                           : "";
        }
        return {
            {"model_type", description},
            {"model_size", llama_model_size(model_.get())},
            {"model_n_params", llama_model_n_params(model_.get())},
            {"backends", backends()},
            {"versions", {{"llama.cpp", llama_version()}, {"runner", RUNNER_TARGET " " RUNNER_KEY}}},
            {"system_info", info},
            {"settings",
             {{"cache_type", cache_type_},
              {"flash_attention", flash_attention()},
              {"weight_buffers", llama_log.weight_buffers()},
              {"cores", usable_cores()}}},
        };
    }

    void clear() { llama_memory_clear(llama_get_memory(context_.get()), true); }

    void decode(Tokens tokens) {
        const size_t most = llama_n_batch(context_.get());
        for (size_t start = 0; start < tokens.size(); start += most) {
            const size_t count = std::min(most, tokens.size() - start);
            compute(llama_batch_get_one(tokens.data() + start, static_cast<int32_t>(count)));
        }
        llama_synchronize(context_.get());
    }

    // Run tokens of several sequences after what these hold, and show the logits after each that is wanted, in order.
    void decode(const std::vector<Entry> & entries, const std::function<void(const float *)> & show) {
        const size_t most = llama_n_batch(context_.get());
        for (size_t start = 0; start < entries.size(); start += most) {
            const size_t count = std::min(most, entries.size() - start);
            const std::unique_ptr<llama_batch, FreeBatch> batch(
                new llama_batch(llama_batch_init(static_cast<int32_t>(count), 0, static_cast<int32_t>(n_seq()))));
            batch->n_tokens = static_cast<int32_t>(count);
            for (size_t i = 0; i < count; ++i) {
                const auto & entry = entries[start + i];
                batch->token[i] = entry.token;
                batch->pos[i] = entry.position;
                batch->n_seq_id[i] = static_cast<int32_t>(entry.sequences.size());
                std::copy(entry.sequences.begin(), entry.sequences.end(), batch->seq_id[i]);
                batch->logits[i] = entry.wanted;
            }
            compute(*batch);
            for (size_t i = 0; i < count; ++i) {
                if (entries[start + i].wanted) {
                    show(llama_get_logits_ith(context_.get(), static_cast<int32_t>(i)));
                }
            }
        }
    }

    Tokens tokenize(const std::string & text) const {
        Tokens tokens(text.size() + 8);
        for (int round = 0; round < 2; ++round) {
            const int count = llama_tokenize(vocab_, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
                                             static_cast<int32_t>(tokens.size()), true, true);
            tokens.resize(static_cast<size_t>(std::abs(count)));
            if (count >= 0) {
                return tokens;
            }
        }
        throw Failure("llama.cpp cannot tokenize a text of " + std::to_string(text.size()) + " bytes with " + path_);
    }

    // The text of a token, special ones written out.
    std::string piece(llama_token token) const {
        std::string text(64, '\0');
        for (int round = 0; round < 2; ++round) {
            const auto size = static_cast<int32_t>(text.size());
            const int count = llama_token_to_piece(vocab_, token, text.data(), size, 0, true);
            text.resize(static_cast<size_t>(std::abs(count)));
            if (count >= 0) {
                break;
            }
        }
        return text;
    }

    llama_token likeliest(const float * logits) const {
        return static_cast<llama_token>(std::max_element(logits, logits + n_vocab()) - logits);
    }

    llama_token sample() const { return likeliest(llama_get_logits_ith(context_.get(), -1)); }

    // As it was asked for; llama.cpp's own may be more.
    size_t n_ctx() const { return n_ctx_; }

    size_t n_seq() const { return llama_n_seq_max(context_.get()); }

    // What such blocks keep of a text belongs to one sequence.
    bool is_recurrent() const { return llama_model_is_recurrent(model_.get()) || llama_model_is_hybrid(model_.get()); }

    bool ends(llama_token token) const { return llama_vocab_is_eog(vocab_, token); }

    int32_t n_vocab() const { return llama_vocab_n_tokens(vocab_); }

    Tokens random_tokens(uint64_t seed, size_t count) const {
        PythonRandom random(seed);
        Tokens tokens(count);
        for (auto & token : tokens) {
            token = static_cast<llama_token>(random.below(static_cast<uint32_t>(n_vocab())));
        }
        if (begins_with_bos_ && count) {
            tokens[0] = llama_vocab_bos(vocab_);
        }
        return tokens;
    }

  private:
    void compute(const llama_batch & batch) {
        const int status = llama_decode(context_.get(), batch);
        if (status == 1) {
            throw Failure(path_ + ": the text does not fit the context of " +
                          std::to_string(llama_n_ctx(context_.get())) + " tokens");
        }
        if (status != 0) {
            throw Failure("llama.cpp cannot run " + path_ + ": " + llama_log.last());
        }
    }
    // What holds, and so multiplies, the weights: CPU, or the devices beside it.
    std::string backends() const {
        std::string names;
        const auto buffers = llama_log.weight_buffers();
        for (const auto & buffer : buffers.items()) {
            if (buffer.key().rfind("CPU", 0) != 0 && buffer.key().rfind("AMX", 0) != 0) {
                names += (names.empty() ? "" : ", ") + buffer.key();
            }
        }
        return names.empty() ? "CPU" : names;
    }
    json flash_attention() const {
        const auto asked = kCacheTypes.at(cache_type_).flash;
        return asked == LLAMA_FLASH_ATTN_TYPE_AUTO ? llama_log.flash_attention()
                                                   : json(asked == LLAMA_FLASH_ATTN_TYPE_ENABLED);
    }
    struct Free {
        void operator()(llama_model * model) const { llama_model_free(model); }
        void operator()(llama_context * context) const { llama_free(context); }
    };
    struct FreeBatch {
        void operator()(llama_batch * batch) const {
            llama_batch_free(*batch);
            delete batch;
        }
    };
    std::string path_;
    size_t n_ctx_ = 0;
    std::vector<ggml_backend_dev_t> devices_;
    std::string cache_type_;
    std::unique_ptr<llama_model, Free> model_;
    std::unique_ptr<llama_context, Free> context_;
    const llama_vocab * vocab_ = nullptr;
    bool begins_with_bos_ = false;
};

}  // namespace runner
