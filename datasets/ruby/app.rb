# A web application that is ready once it has answered a request to itself.
require 'json'
require 'net/http'
require 'nokogiri'
require 'tilt/erb'
require 'webrick'

PAGE = Tilt::ERBTemplate.new { '<html><body><p><%= name %></p></body></html>' }

server = WEBrick::HTTPServer.new(BindAddress: '127.0.0.1', Port: 3000, AccessLog: [], Logger: WEBrick::Log.new(File::NULL))
server.mount_proc('/items') do |request, response|
  name = Nokogiri::HTML(PAGE.render(nil, name: request.query['name'])).at('p').text
  response.body = JSON.generate(name: name)
end

Thread.new do
  answer = JSON.parse(Net::HTTP.get(URI('http://127.0.0.1:3000/items?name=seven')))
  raise "unexpected answer: #{answer}" unless answer['name'] == 'seven'

  puts 'READY'
  $stdout.flush
end

%w[TERM INT].each { |signal| trap(signal) { server.shutdown } }
server.start
