// Elasticsearch accepts a REST interceptor from plugins of this package tree only.
package org.elasticsearch.xpack.embedded;

import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.Base64;
import java.util.Collection;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.function.Predicate;
import java.util.function.Supplier;
import org.apache.lucene.analysis.Analyzer;
import org.apache.lucene.analysis.cjk.CJKAnalyzer;
import org.apache.lucene.analysis.cn.smart.SmartChineseAnalyzer;
import org.apache.lucene.analysis.en.EnglishAnalyzer;
import org.elasticsearch.Build;
import org.elasticsearch.ElasticsearchSecurityException;
import org.elasticsearch.client.internal.node.NodeClient;
import org.elasticsearch.cluster.node.DiscoveryNodes;
import org.elasticsearch.common.util.concurrent.ThreadContext;
import org.elasticsearch.features.NodeFeature;
import org.elasticsearch.index.analysis.AbstractIndexAnalyzerProvider;
import org.elasticsearch.index.analysis.AnalyzerProvider;
import org.elasticsearch.indices.analysis.AnalysisModule.AnalysisProvider;
import org.elasticsearch.plugins.AnalysisPlugin;
import org.elasticsearch.plugins.Plugin;
import org.elasticsearch.plugins.interceptor.RestServerActionPlugin;
import org.elasticsearch.rest.BaseRestHandler;
import org.elasticsearch.rest.RestHandler;
import org.elasticsearch.rest.RestInterceptor;
import org.elasticsearch.rest.RestRequest;
import org.elasticsearch.rest.RestResponse;
import org.elasticsearch.rest.RestStatus;
import org.elasticsearch.xcontent.XContentBuilder;

/**
 * What the product needs of modules that are not published as Maven artifacts.
 *
 * <ul>
 *   <li>The analyzers `smartcn`, `cjk` and `english`: Lucene's own, without settings, under Elasticsearch's names.
 *   <li>`GET /` and `HEAD /`: a substitute with the fields that clients read (name, version, tagline).
 *   <li>HTTP Basic authentication of the one user `elastic`, a substitute for the security module: each request must
 *       carry the password that the environment variable ELASTIC_PASSWORD holds; there are no roles and no API keys.
 * </ul>
 */
public final class EmbeddedPlugin extends Plugin implements AnalysisPlugin, RestServerActionPlugin {
    private static final String USER = "elastic";

    @Override
    public Map<String, AnalysisProvider<AnalyzerProvider<? extends Analyzer>>> getAnalyzers() {
        return Map.of(
                "smartcn", provider(SmartChineseAnalyzer::new),
                "cjk", provider(CJKAnalyzer::new),
                "english", provider(EnglishAnalyzer::new));
    }

    private static AnalysisProvider<AnalyzerProvider<? extends Analyzer>> provider(Supplier<Analyzer> maker) {
        return (indexSettings, environment, name, settings) -> new Fixed(name, maker.get());
    }

    /** An analyzer that takes no settings. */
    private static final class Fixed extends AbstractIndexAnalyzerProvider<Analyzer> {
        private final Analyzer analyzer;

        Fixed(String name, Analyzer analyzer) {
            super(name);
            this.analyzer = analyzer;
        }

        @Override
        public Analyzer get() {
            return analyzer;
        }
    }

    @Override
    public RestInterceptor getRestHandlerInterceptor(ThreadContext context) {
        String password = Objects.requireNonNull(System.getenv("ELASTIC_PASSWORD"), "ELASTIC_PASSWORD is not set");
        String pair = Base64.getEncoder().encodeToString((USER + ":" + password).getBytes(StandardCharsets.UTF_8));
        byte[] wanted = ("Basic " + pair).getBytes(StandardCharsets.US_ASCII);
        return (request, channel, handler, listener) -> {
            String given = Objects.requireNonNullElse(request.header("Authorization"), "");
            // isEqual takes the same time wherever the first difference is.
            if (MessageDigest.isEqual(given.getBytes(StandardCharsets.UTF_8), wanted)) {
                listener.onResponse(true);
            } else {
                var refused = new ElasticsearchSecurityException("wrong user or password", RestStatus.UNAUTHORIZED);
                refused.addBodyHeader("WWW-Authenticate", "Basic realm=\"elasticsearch\", charset=\"UTF-8\"");
                listener.onFailure(refused);
            }
        };
    }

    @Override
    public Collection<RestHandler> getRestHandlers(
            RestHandlersServices services, Supplier<DiscoveryNodes> nodes, Predicate<NodeFeature> features) {
        return List.of(new Root());
    }

    private static final class Root extends BaseRestHandler {
        @Override
        public String getName() {
            return "root";
        }

        @Override
        public List<Route> routes() {
            return List.of(new Route(RestRequest.Method.GET, "/"), new Route(RestRequest.Method.HEAD, "/"));
        }

        @Override
        protected RestChannelConsumer prepareRequest(RestRequest request, NodeClient client) {
            return channel -> {
                XContentBuilder body = channel.newBuilder().startObject();
                body.field("name", client.settings().get("node.name"));
                body.field("cluster_name", client.settings().get("cluster.name"));
                body.startObject("version");
                body.field("number", Build.current().version());
                body.field("build_flavor", Build.current().flavor());
                body.field("lucene_version", org.apache.lucene.util.Version.LATEST.toString());
                body.endObject();
                body.field("tagline", "You Know, for Search");
                channel.sendResponse(new RestResponse(RestStatus.OK, body.endObject()));
            };
        }
    }
}
