package com.example.chat

import java.io.File
import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction

/** Someone's turn: `system`, `user` or `assistant`. */
data class Message(val role: String, val content: String)

/** @property cut Whether the context was full before the turn ended. */
data class Answer(val text: String, val cut: Boolean)

/** How a token is drawn: at a temperature of 0 the likeliest. A model's own settings are in its release's Modelfile. */
data class Sampling(val temperature: Float = 0f, val topP: Float = 1f, val seed: Int = 1)

/**
 * A GGUF file that answers. Calls wait for each other; none belongs on the thread of the user interface.
 *
 * llama.cpp's library knows the usual chat templates by their look, not what else one of them does: SmolLM2's adds a
 * system message where a conversation has none, so begin with that message yourself.
 *
 * @param contextTokens What the conversation and its answer may have; memory is taken for all of them.
 * @param threads As many as the processor has fast cores.
 * @throws IllegalArgumentException for a file that cannot be read, or a number that makes no sense.
 * @throws IllegalStateException for a file that llama.cpp cannot load, with its reason.
 */
class Chat(file: File, contextTokens: Int = 2048, threads: Int = 4, sampling: Sampling = Sampling()) : AutoCloseable {
    private var handle: Long

    init {
        require(contextTokens > 0 && threads > 0) { "contextTokens and threads are above 0" }
        require(file.isFile && file.canRead()) { "cannot read $file" }
        handle = open(file.path.toByteArray(), contextTokens, threads, sampling.temperature, sampling.topP, sampling.seed)
    }

    /**
     * What the model says next. What it shares with the conversation before is not read again.
     *
     * @param onText Gets the text as it comes, whole characters; false ends the answer.
     * @throws IllegalStateException for a conversation that has no room, or a file without a template that is known.
     */
    @Synchronized
    fun answer(messages: List<Message>, onText: (String) -> Boolean = { true }): Answer {
        check(handle != 0L) { "the chat is closed" }
        begin(handle, bytes(messages) { it.role }, bytes(messages) { it.content })
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
        return Answer(text.append(rest).toString(), full(handle))
    }

    @Synchronized
    override fun close() {
        if (handle != 0L) close(handle)
        handle = 0
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
private class Characters {
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
        open = ByteArray(input.remaining()).also { input.get(it) }
        output.flip()
        return output.toString()
    }
}
