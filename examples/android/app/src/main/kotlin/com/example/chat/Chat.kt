package com.example.chat

import java.io.File
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction

/** Someone's turn: `system`, `user` or `assistant`. */
data class Message(val role: String, val content: String)

/** @property cut Whether the context was full before the turn ended. */
data class Answer(val text: String, val cut: Boolean)

/** How a token is drawn: at a temperature of 0 the likeliest. The same seed draws the same, but for -1: another each time. */
data class Sampling(val temperature: Float = 0f, val topP: Float = 1f, val seed: Int = 1)

/**
 * A GGUF file that answers. Calls wait for each other; none belongs on the thread of the user interface.
 *
 * llama.cpp's library knows the usual chat templates by their look, not what else one of them does: where a conversation
 * has no system message, SmolLM2's own template adds one, and here nothing does.
 *
 * @param contextTokens What the conversation and its answer may have; memory is taken for all of them.
 * @param threads As many as the processor has fast cores.
 * @throws IllegalArgumentException for a file that cannot be read, or a number that makes no sense.
 * @throws IllegalStateException for a file that llama.cpp cannot load, with its reason.
 */
class Chat(file: File, contextTokens: Int = 2048, threads: Int = 4, sampling: Sampling = Sampling()) : AutoCloseable {
    private var handle: Long
    private var answering = false

    init {
        require(contextTokens > 0 && threads > 0) { "contextTokens and threads are above 0" }
        require(sampling.temperature >= 0 && sampling.topP in 0f..1f) { "temperature is 0 or above, topP from 0 to 1" }
        require(file.isFile && file.canRead()) { "cannot read $file" }
        handle = open(file.path.toByteArray(), contextTokens, threads, sampling.temperature, sampling.topP, sampling.seed)
    }

    /**
     * What the model says next. What it shares with the conversation before is not read again, unless the model keeps
     * states that cannot be cut.
     *
     * @param onText Gets the text as it comes, whole characters; false ends the answer. It may not call this chat.
     * @throws IllegalStateException for a conversation that has no room, or a file without a template that is known.
     */
    @Synchronized
    fun answer(messages: List<Message>, onText: (String) -> Boolean = { true }): Answer {
        check(handle != 0L) { "the chat is closed" }
        check(!answering) { "the chat is answering" }
        require(messages.none { '\u0000' in it.role || '\u0000' in it.content }) { "a message has no character 0" }
        answering = true
        try {
            begin(handle, bytes(messages) { it.role }, bytes(messages) { it.content })
            return Answer(written(onText), full(handle))
        } finally {
            answering = false
        }
    }

    @Synchronized
    override fun close() {
        check(!answering) { "the chat is answering" }
        if (handle != 0L) close(handle)
        handle = 0
    }

    private fun written(onText: (String) -> Boolean): String {
        val text = StringBuilder()
        val characters = Characters()
        var wanted = true
        while (wanted) {
            val piece = characters.of(next(handle) ?: break)
            text.append(piece)
            wanted = piece.isEmpty() || onText(piece)
        }
        val rest = characters.rest()
        if (wanted && rest.isNotEmpty()) onText(rest)
        return text.append(rest).toString()
    }

    private fun bytes(messages: List<Message>, part: (Message) -> String) =
        Array(messages.size) { part(messages[it]).toByteArray() }

    private external fun open(
        file: ByteArray, contextTokens: Int, threads: Int, temperature: Float, topP: Float, seed: Int,
    ): Long

    private external fun begin(handle: Long, roles: Array<ByteArray>, contents: Array<ByteArray>)

    private external fun next(handle: Long): ByteArray?

    private external fun full(handle: Long): Boolean

    private external fun close(handle: Long)

    private companion object {
        init {
            System.loadLibrary("chat")
        }
    }
}

/** Text of bytes that come token by token: a character may begin in one and end in the next. */
internal class Characters {
    private val decoder = Charsets.UTF_8.newDecoder()
        .onMalformedInput(CodingErrorAction.REPLACE)
        .onUnmappableCharacter(CodingErrorAction.REPLACE)
    private var open = ByteArray(0)

    fun of(bytes: ByteArray) = decode(open + bytes, false)

    /** What has begun and did not end. */
    fun rest() = decode(open, true)

    private fun decode(bytes: ByteArray, last: Boolean): String {
        val input = ByteBuffer.wrap(bytes)
        val output = CharBuffer.allocate(bytes.size + 1)
        decoder.decode(input, output, last)
        if (last) decoder.flush(output)  // Android's holds what has begun inside
        open = ByteArray(input.remaining()).also { input.get(it) }
        output.flip()
        return output.toString()
    }
}
