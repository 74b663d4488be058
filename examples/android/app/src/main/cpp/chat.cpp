// What Chat.kt asks of llama.cpp: an open file, a conversation read into its context, and an answer token by token.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <jni.h>
#ifdef CHAT_NEEDS_DOTPROD
#include <asm/hwcap.h>
#include <sys/auxv.h>
constexpr unsigned long kFeatures = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
#endif

#include "llama.h"

namespace {

using Tokens = std::vector<llama_token>;

// What llama.cpp complained of since it was asked to do something, for the reason of a failure.
class Complaint {
  public:
    void add(ggml_log_level level, const char * text) {
        const std::lock_guard<std::mutex> hold(lock_);
        complains_ = level == GGML_LOG_LEVEL_CONT ? complains_ : level == GGML_LOG_LEVEL_ERROR;
        for (const char * letter = complains_ ? text : ""; *letter; ++letter) {
            text_ += *letter == '\n' ? std::string("; ") : std::string(1, *letter);
        }
    }
    void forget() {
        const std::lock_guard<std::mutex> hold(lock_);
        text_.clear();
    }
    std::string text() {
        const std::lock_guard<std::mutex> hold(lock_);
        return text_.empty() ? "llama.cpp gave no reason" : text_.substr(0, text_.find_last_not_of("; ") + 1);
    }

  private:
    std::mutex lock_;
    bool complains_ = false;
    std::string text_;
};

Complaint & complaint() {
    static Complaint last;
    return last;
}

struct Close {
    void operator()(llama_model * model) const { llama_model_free(model); }
    void operator()(llama_context * context) const { llama_free(context); }
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

template <typename Part> using Owned = std::unique_ptr<Part, Close>;

// What llama.cpp was asked to make.
template <typename Make> auto made(const char * what, Make make) {
    complaint().forget();
    const auto part = make();
    if (!part) {
        throw std::runtime_error(std::string(what) + ": " + complaint().text());
    }
    return Owned<std::remove_pointer_t<decltype(make())>>(part);
}

// The kernels are compiled for processors that have these; without them the first product would end the app.
void require_features() {
#ifdef CHAT_NEEDS_DOTPROD
    if ((getauxval(AT_HWCAP) & kFeatures) != kFeatures) {
        throw std::runtime_error("this processor has no dot products of bytes (asimddp) or halves (asimdhp)");
    }
#endif
}

class Chat {
  public:
    Chat(const std::string & file, int context_tokens, int threads, float temperature, float top_p, uint32_t seed)
        : room_(static_cast<size_t>(context_tokens)),
          model_(made("cannot load the file",
                      [&] { return llama_model_load_from_file(file.c_str(), llama_model_default_params()); })),
          vocab_(llama_model_get_vocab(model_.get())) {
        if (context_tokens > llama_model_n_ctx_train(model_.get())) {
            throw std::runtime_error("the model has learnt contexts of up to "
                                     + std::to_string(llama_model_n_ctx_train(model_.get())) + " tokens");
        }
        auto settings = llama_context_default_params();
        settings.n_ctx = static_cast<uint32_t>(context_tokens);
        settings.n_batch = 512;
        settings.n_threads = settings.n_threads_batch = threads;
        settings.swa_full = true;  // a cache of the window alone cannot be cut where conversations part
        context_ = made("cannot make room for the context", [&] { return llama_init_from_model(model_.get(), settings); });
        chain_ = made("cannot sample", [] { return llama_sampler_chain_init(llama_sampler_chain_default_params()); });
        if (temperature > 0) {
            llama_sampler_chain_add(chain_.get(), llama_sampler_init_top_p(top_p, 1));
            llama_sampler_chain_add(chain_.get(), llama_sampler_init_temp(temperature));
            llama_sampler_chain_add(chain_.get(), llama_sampler_init_dist(seed));
        } else {
            llama_sampler_chain_add(chain_.get(), llama_sampler_init_greedy());
        }
    }

    // Reads a conversation; of what the context holds already, the beginning that is the same is kept.
    void begin(const std::vector<std::pair<std::string, std::string>> & messages) {
        const Tokens tokens = tokenized(rendered(messages));
        if (tokens.empty() || tokens.size() >= room_) {
            throw std::runtime_error("the conversation takes " + std::to_string(tokens.size()) + " tokens, and the context has "
                                     + std::to_string(room_));
        }
        // The last token is read again even where all are the same: what follows it is wanted.
        const auto end = std::min(held_.size(), tokens.size() - 1);
        const auto same = std::mismatch(held_.begin(), held_.begin() + static_cast<std::ptrdiff_t>(end), tokens.begin()).first;
        forget_from(static_cast<size_t>(same - held_.begin()));
        next_ = LLAMA_TOKEN_NULL;
        full_ = false;
        llama_sampler_reset(chain_.get());
        read(Tokens(tokens.begin() + static_cast<std::ptrdiff_t>(held_.size()), tokens.end()));
    }

    // The bytes of one more token, and whether there was one: none at the end of the turn or of the context.
    std::pair<std::string, bool> next() {
        if (held_.empty()) {
            throw std::runtime_error("no conversation was read");
        }
        if (next_ != LLAMA_TOKEN_NULL) {
            if (held_.size() >= room_) {
                full_ = true;
                return {"", false};
            }
            read({std::exchange(next_, LLAMA_TOKEN_NULL)});
        }
        const auto token = llama_sampler_sample(chain_.get(), context_.get(), -1);
        if (llama_vocab_is_eog(vocab_, token)) {
            return {"", false};
        }
        next_ = token;
        return {spelled(token), true};
    }

    bool full() const { return full_; }

  private:
    std::string rendered(const std::vector<std::pair<std::string, std::string>> & messages) const {
        const char * style = llama_model_chat_template(model_.get(), nullptr);
        if (!style) {
            throw std::runtime_error("the file has no chat template");
        }
        std::vector<llama_chat_message> turns;
        for (const auto & [role, content] : messages) {
            turns.push_back({role.c_str(), content.c_str()});
        }
        std::string text;
        const auto write = [&] {
            return llama_chat_apply_template(style, turns.data(), turns.size(), true, text.data(), static_cast<int>(text.size()));
        };
        const int size = write();
        if (size < 0) {
            throw std::runtime_error("llama.cpp's library does not know the file's chat template");
        }
        text.resize(static_cast<size_t>(size) + 1);
        write();
        text.resize(static_cast<size_t>(size));
        return text;
    }

    // Control tokens are read in what people write, too: an app that must not let them end a turn takes them out before.
    Tokens tokenized(const std::string & text) const {
        Tokens tokens(text.size());
        const auto write = [&] {
            return llama_tokenize(vocab_, text.data(), static_cast<int>(text.size()), tokens.data(),
                                  static_cast<int>(tokens.size()), true, true);
        };
        int count = write();
        if (count < 0) {  // what begins and ends a text are tokens without a letter
            tokens.resize(static_cast<size_t>(-count));
            count = write();
        }
        tokens.resize(static_cast<size_t>(std::max(count, 0)));
        return tokens;
    }

    std::string spelled(llama_token token) const {
        std::string text(64, '\0');
        int size = llama_token_to_piece(vocab_, token, text.data(), static_cast<int>(text.size()), 0, false);
        if (size < 0) {
            text.resize(static_cast<size_t>(-size));
            size = llama_token_to_piece(vocab_, token, text.data(), static_cast<int>(text.size()), 0, false);
        }
        text.resize(static_cast<size_t>(size));
        return text;
    }

    // The states of recurrent models and convolutions hold all that was read: they cannot be cut, and all is read anew.
    void forget_from(size_t position) {
        const auto memory = llama_get_memory(context_.get());
        if (position < held_.size() && !llama_memory_seq_rm(memory, 0, static_cast<llama_pos>(position), -1)) {
            llama_memory_clear(memory, true);
            position = 0;
        }
        held_.resize(position);
    }

    void read(Tokens tokens) {
        const size_t most = llama_n_batch(context_.get());
        complaint().forget();
        for (size_t start = 0; start < tokens.size(); start += most) {
            const auto count = std::min(most, tokens.size() - start);
            if (llama_decode(context_.get(), llama_batch_get_one(tokens.data() + start, static_cast<int>(count)))) {
                llama_memory_clear(llama_get_memory(context_.get()), true);
                held_.clear();
                throw std::runtime_error("cannot compute: " + complaint().text());
            }
            const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(start);
            held_.insert(held_.end(), first, first + static_cast<std::ptrdiff_t>(count));
        }
    }

    size_t room_;  // tokens of a conversation and its answer; llama.cpp's own room is a multiple of 256
    Owned<llama_model> model_;
    const llama_vocab * vocab_;
    Owned<llama_context> context_;
    Owned<llama_sampler> chain_;
    Tokens held_;  // what the context has read
    llama_token next_ = LLAMA_TOKEN_NULL;  // written, not yet read
    bool full_ = false;
};

// Bytes, as JNI's own strings are no UTF-8 beyond the basic plane.
std::string text_of(JNIEnv * env, jbyteArray bytes) {
    std::string text(static_cast<size_t>(env->GetArrayLength(bytes)), '\0');
    env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<jbyte *>(text.data()));
    return text;
}

std::string text_at(JNIEnv * env, jobjectArray texts, jsize index) {
    const auto bytes = static_cast<jbyteArray>(env->GetObjectArrayElement(texts, index));
    auto text = text_of(env, bytes);
    env->DeleteLocalRef(bytes);
    return text;
}

// What fails becomes an IllegalStateException.
template <typename Action> auto guarded(JNIEnv * env, Action action) -> decltype(action()) {
    try {
        return action();
    } catch (const std::exception & error) {
        std::string text = error.what();
        // ThrowNew wants JNI's own form of UTF-8, which ASCII is.
        std::replace_if(text.begin(), text.end(), [](char letter) { return letter < ' ' || letter > '~'; }, '?');
        env->ThrowNew(env->FindClass("java/lang/IllegalStateException"), text.c_str());
        return decltype(action())();
    }
}

Chat * chat_of(jlong handle) { return reinterpret_cast<Chat *>(handle); }

}  // namespace

extern "C" {

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *, void *) {
    llama_log_set([](ggml_log_level level, const char * text, void *) { complaint().add(level, text); }, nullptr);
    llama_backend_init();
    return JNI_VERSION_1_6;
}

JNIEXPORT jlong JNICALL Java_com_example_chat_Chat_open(JNIEnv * env, jobject, jbyteArray file, jint context_tokens, jint threads,
                                                        jfloat temperature, jfloat top_p, jint seed) {
    return guarded(env, [&] {
        require_features();
        return reinterpret_cast<jlong>(
            new Chat(text_of(env, file), context_tokens, threads, temperature, top_p, static_cast<uint32_t>(seed)));
    });
}

JNIEXPORT void JNICALL Java_com_example_chat_Chat_begin(JNIEnv * env, jobject, jlong handle, jobjectArray roles,
                                                        jobjectArray contents) {
    guarded(env, [&] {
        std::vector<std::pair<std::string, std::string>> messages;
        for (jsize i = 0; i < env->GetArrayLength(roles); ++i) {
            messages.emplace_back(text_at(env, roles, i), text_at(env, contents, i));
        }
        chat_of(handle)->begin(messages);
    });
}

JNIEXPORT jbyteArray JNICALL Java_com_example_chat_Chat_next(JNIEnv * env, jobject, jlong handle) {
    return guarded(env, [&]() -> jbyteArray {
        const auto [text, any] = chat_of(handle)->next();
        if (!any) {
            return nullptr;
        }
        const auto bytes = env->NewByteArray(static_cast<jsize>(text.size()));
        if (bytes) {
            env->SetByteArrayRegion(bytes, 0, static_cast<jsize>(text.size()), reinterpret_cast<const jbyte *>(text.data()));
        }
        return bytes;
    });
}

JNIEXPORT jboolean JNICALL Java_com_example_chat_Chat_full(JNIEnv *, jobject, jlong handle) {
    return chat_of(handle)->full();
}

JNIEXPORT void JNICALL Java_com_example_chat_Chat_close(JNIEnv *, jobject, jlong handle) { delete chat_of(handle); }

}  // extern "C"
